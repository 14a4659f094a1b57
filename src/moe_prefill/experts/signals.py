"""Counters that the ranks of a group raise in each other's memory, in the order of their lanes.

A rank writes only its own counter in a peer's memory, and waits only on its own memory. On CUDA both happen on the
device: neither the host nor a multiprocessor waits.
"""

from __future__ import annotations

import torch

from .lanes import Lane, write_now
from .shared_memory import SharedBlock
from .transport import Setup

ABORTED = 0x7FFFFFFF  # at least any value that is waited for
_BYTES = 4  # int32


class Signals:
    """``kinds`` counters a rank, all 0 at first."""

    def __init__(self, name: str, kinds: int, setup: Setup) -> None:
        self._device = setup.device
        self._ranks = setup.ranks
        self._block = SharedBlock(name, kinds * setup.ranks.size * _BYTES, setup.device, setup.ranks)

    def post(self, kind: int, value: int, lane: Lane) -> None:
        """When the lane gets here, tell every peer that this rank's counter is ``value``."""
        assert value < ABORTED, value
        for peer in self._ranks.peers():
            lane.post(self._block.of[peer][self._place(kind, self._ranks.rank)], value)

    def wait(self, kind: int, value: int, lane: Lane) -> None:
        """The lane goes on when every peer's counter is at least ``value``; WorkerError on it after the ranks' timeout,
        where the lane can know it.
        """
        for peer in self._ranks.peers():
            lane.await_value(self._block.mine[self._place(kind, peer)], value, self._ranks.timeout_s)

    def abort(self) -> None:
        """Let every wait of this rank go, from any thread. A peer that raises its counter later undoes that for its
        own; it does so again and again until its own waits are let go.
        """
        write_now(self._block.mine.view(torch.int32), ABORTED)

    def close(self, *, wait: bool = True) -> None:
        self._block.close(wait=wait)

    def _place(self, kind: int, rank: int) -> slice:
        first = (kind * self._ranks.size + rank) * _BYTES
        return slice(first, first + _BYTES)
