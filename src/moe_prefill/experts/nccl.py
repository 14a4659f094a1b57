"""The collective transport, the paper's own: an all-gather of every rank's shard. For comparison, and where GPUs have
no peer access.

Being collective it couples the ranks: each must fetch the same banks in the same order (rounds). NCCL on CUDA, gloo on
a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from ..errors import WorkerError
from . import device_memory
from .lanes import Lane
from .ranks import Ranks
from .transport import BytesByLink, Setup


class NcclTransport:
    """Each shard is a tensor of its own on the device."""

    def __init__(self, layers: Sequence[int], setup: Setup) -> None:
        self._shards = {layer: device_memory.empty(setup.shard_bytes, setup.device) for layer in layers}
        self._places = setup.layout.shards(setup.ranks.size)
        self._rank = setup.ranks.rank
        self._group = _open_group(setup.ranks, setup.device)

    def place(self, layer: int) -> torch.Tensor:
        return self._shards[layer]

    def fetch(self, layer: int, buffer: torch.Tensor, lane: Lane) -> BytesByLink:
        shard = self._shards[layer]
        lane.run(lambda: self._gather(buffer, shard))
        return {"local": shard.numel(), "nccl": buffer.numel() - shard.numel()}

    def abort(self, reason: str) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.shutdown()
        self._shards.clear()

    def _gather(self, buffer: torch.Tensor, shard: torch.Tensor) -> None:
        try:
            self._all_gather(buffer, shard)
        except RuntimeError as error:
            raise WorkerError(f"gathering an expert bank from all ranks failed: {error}") from error

    def _all_gather(self, buffer: torch.Tensor, shard: torch.Tensor) -> None:
        """Shards of one size are one collective; of two sizes, which it does not take, a broadcast from each rank."""
        if len({place.stop - place.start for place in self._places}) == 1:
            self._group._allgather_base(buffer, shard).wait()
            return
        buffer[self._places[self._rank]].copy_(shard, non_blocking=True)
        for root, place in enumerate(self._places):
            if place.stop > place.start:
                self._group.broadcast(buffer[place], root).wait()


def _open_group(ranks: Ranks, device: torch.device) -> Any:
    """A group of its own, so that no other collective of this process comes between."""
    assert ranks.store is not None
    store = PrefixStore("banks", ranks.store)
    if device.type == "cuda":
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no multicast over NVLink
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=ranks.timeout_s)
        return dist.ProcessGroupNCCL(store, ranks.rank, ranks.size, options)
    return dist.ProcessGroupGloo(store, ranks.rank, ranks.size, timedelta(seconds=ranks.timeout_s))
