"""What ranks exchange, over NCCL or gloo, and how many bytes each of them sends.

The counter's convention: an all-gather sends a rank's rows to every other rank; a reduce-scatter sends each other rank
its part; an all-reduce is a reduce-scatter and an all-gather; what stays on the rank is not sent. That is what a ring
moves, whatever algorithm the library picks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
import torch.distributed as dist

from ..core import Int64Array

# Releases of torch after 2.11 have new names for these, and warn of the old ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """This process among those that share a model. ``group`` moves tensors of ``device``; ``control`` (gloo) moves host
    integers once a sweep, so that no rank waits for its device to learn how many steps a layer has.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup
    control: dist.ProcessGroup

    @classmethod
    def of_world(cls, device: torch.device) -> RankGroup:
        """All processes of the initialised default group; every one of them has to call this."""
        world = dist.group.WORLD
        assert world is not None, "torch.distributed is not initialised"
        control = world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
        assert control is not None
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device, group=world, control=control)


@dataclass(slots=True)
class Traffic:
    """Bytes sent by this device, by (layer, operation). ``layer`` is set by the loop over layers."""

    layer: int = -1
    sent: defaultdict[tuple[int, str], Fraction] = field(default_factory=lambda: defaultdict(Fraction))

    def add(self, operation: str, num_bytes: int | Fraction) -> None:
        """Count bytes of the current layer."""
        if num_bytes:
            self.sent[self.layer, operation] += num_bytes


class Collectives:
    """The operations of the strategies. Enqueued on the device; only ``gather_host`` waits."""

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self.traffic = Traffic()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        others = Fraction(self.ranks.size - 1, self.ranks.size)
        self.traffic.add("all-reduce", 2 * others * x.nbytes)
        dist.all_reduce(x, group=self.ranks.group)
        return x

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Equally many rows of every rank, in order of ranks: [m, ...] to [N m, ...]."""
        self.traffic.add("all-gather", (self.ranks.size - 1) * rows.nbytes)
        out = rows.new_empty(self.ranks.size * len(rows), *rows.shape[1:])
        _all_gather(out, rows.contiguous(), group=self.ranks.group)
        return out

    def reduce_scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of [N m, ...]; each rank gets its own m rows."""
        out = rows.new_empty(len(rows) // self.ranks.size, *rows.shape[1:])
        self.traffic.add("reduce-scatter", rows.nbytes - out.nbytes)
        _reduce_scatter(out, rows, group=self.ranks.group)
        return out

    def all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int], operation: str) -> torch.Tensor:
        """``send[r]`` rows go to rank r, in order of ranks; ``receive[r]`` come from it."""
        row_bytes = rows[:1].nbytes if len(rows) else 0
        self.traffic.add(operation, (len(rows) - send[self.ranks.rank]) * row_bytes)
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.ranks.group)
        return out

    def gather_host(self, values: list[int]) -> Int64Array:
        """Integers of every rank, [N, len(values)]; waits for all ranks to come here."""
        mine = torch.tensor(values, dtype=torch.int64)
        out = torch.empty(self.ranks.size * len(values), dtype=torch.int64)
        _all_gather(out, mine, group=self.ranks.control)
        return out.view(self.ranks.size, len(values)).numpy().astype(np.int64, copy=False)
