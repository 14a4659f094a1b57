"""Transports: where a rank's part of its streamed banks lives, and how a whole bank gets into a buffer of its device.

They know bytes and lanes, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .host_pool import HostPool
from .lanes import DEFAULT_SLICE_BYTES, Lane
from .layout import BankLayout
from .ranks import ALONE, Ranks

BytesByLink = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every transport of a rank is made for."""

    layout: BankLayout
    device: torch.device
    ranks: Ranks = ALONE
    slice_bytes: int = DEFAULT_SLICE_BYTES

    @property
    def shard_bytes(self) -> int:
        """Bytes of this rank's shard of a bank."""
        mine = self.layout.shard(self.ranks.rank, self.ranks.size)
        return int(mine.stop - mine.start)


class Transport(Protocol):
    """Made, with its memory, by all ranks alike; then filled through ``place``; fetched from when all ranks are through
    with that.
    """

    def place(self, layer: int) -> torch.Tensor:
        """Where this rank's part of a bank is to be written: uint8, whole records."""
        ...

    def fetch(self, layer: int, buffer: torch.Tensor, lane: Lane) -> BytesByLink:
        """Enqueue on ``lane`` what fills ``buffer`` (uint8 [bank bytes]) with a layer's bank; says what is moved.

        Links: ``host`` (host memory to device), ``local`` (within the device), ``peer.<rank>``, ``nccl``.
        """
        ...

    def abort(self, reason: str) -> None:
        """Let go of every wait for another rank, now and from now on; callable from any thread."""
        ...

    def close(self) -> None:
        """Give the memory back; no fetch is under way any more."""
        ...


class HostTransport:
    """Whole banks in (pinned) host memory, for a rank that is alone."""

    def __init__(self, layers: Sequence[int], setup: Setup) -> None:
        self._pool = HostPool(dict.fromkeys(layers, setup.layout.bank_bytes), setup.device)

    def place(self, layer: int) -> torch.Tensor:
        return self._pool[layer]

    def fetch(self, layer: int, buffer: torch.Tensor, lane: Lane) -> BytesByLink:
        lane.copy(buffer, self._pool[layer])
        return {"host": buffer.numel()}

    def abort(self, reason: str) -> None:
        pass

    def close(self) -> None:
        self._pool.close()
