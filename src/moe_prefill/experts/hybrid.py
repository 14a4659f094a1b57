"""The hybrid transport: every rank keeps 1/N of each bank in its own host memory, stages it on its device some banks
ahead over its own link, and gathers the others' staged shards.

Two pipelines meet in a ring of staged shards. Bank n, counted over all sweeps, is staged in slot n modulo their number
when every rank has gathered the bank that was there; it is gathered when every rank has staged it. So ranks depend on
each other and go in rounds: each makes the same number of sweeps, with or without tokens. All that a round enqueues is
done when every rank has enqueued that round; nothing waits for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gather import Gather
from .host_pool import HostPool
from .lanes import Lane, Mark, open_lane
from .peer import nth_part
from .shared_memory import SharedBlock
from .signals import Signals
from .transport import BytesByLink, Setup

_STAGED, _GATHERED = 0, 1  # kinds of signals; their values count banks


class HybridTransport:
    """``slots`` staged shards a rank; ``layers`` are fetched in this order, round and round."""

    def __init__(self, layers: Sequence[int], setup: Setup, slots: int) -> None:
        assert slots >= 1, slots
        self._layers = tuple(layers)
        self._slots = slots
        self._pool = HostPool(dict.fromkeys(layers, setup.shard_bytes), setup.device)
        self._block = SharedBlock("banks/staged", slots * setup.shard_bytes, setup.device, setup.ranks)
        self._signals = Signals("banks/signals", 2, setup)
        self._gather = Gather(setup)
        self._staging = open_lane(setup.device, setup.slice_bytes)
        self._staged: dict[int, Mark] = {}  # by slot: this rank's shard is there
        self._gathered: dict[int, Mark] = {}  # by slot: this rank has read everybody's shard
        self._num_staged = self._num_gathered = 0  # banks given to the lanes
        self._aborted = False

    def place(self, layer: int) -> torch.Tensor:
        return self._pool[layer]

    def fetch(self, layer: int, buffer: torch.Tensor, lane: Lane) -> BytesByLink:
        number = self._num_gathered
        assert layer == self._layers[number % len(self._layers)], (layer, number)
        self._stage_until(number + self._slots)
        slot = number % self._slots
        self._signals.wait(_STAGED, number + 1, lane)
        lane.wait(self._staged[slot])
        moved = self._gather.enqueue(buffer, [nth_part(block, slot, self._slots) for block in self._block.of], lane)
        self._signals.post(_GATHERED, number + 1, lane)
        self._gathered[slot] = lane.mark()
        self._num_gathered += 1
        self._stage_until(self._num_gathered + self._slots)
        return {"host": self._pool[layer].numel(), **moved}

    def abort(self, reason: str) -> None:
        self._aborted = True
        self._signals.abort()

    def close(self) -> None:
        self._staging.close()
        self._gather.close()
        self._signals.close(wait=not self._aborted)
        self._block.close(wait=not self._aborted)
        self._pool.close()

    def _stage_until(self, number: int) -> None:
        while self._num_staged < number:
            self._stage(self._num_staged)
            self._num_staged += 1

    def _stage(self, number: int) -> None:
        """Bring this rank's shard of bank ``number`` to the device, as soon as nobody needs what is in its slot."""
        slot, lane = number % self._slots, self._staging
        if number >= self._slots:
            self._signals.wait(_GATHERED, number - self._slots + 1, lane)
            lane.wait(self._gathered[slot])
        target = nth_part(self._block.mine, slot, self._slots)
        lane.copy(target, self._pool[self._layers[number % len(self._layers)]])
        self._signals.post(_STAGED, number + 1, lane)
        self._staged[slot] = lane.mark()
