"""Transports: how a whole bank gets into a buffer of this device. They know bytes and lanes, no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from .host_pool import HostPool
from .lanes import Lane

BytesByLink = Mapping[str, int]


class Transport(Protocol):
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
    """Whole banks from (pinned) host memory, for a rank that needs no other."""

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool

    def fetch(self, layer: int, buffer: torch.Tensor, lane: Lane) -> BytesByLink:
        lane.copy(buffer, self._pool[layer])
        return {"host": buffer.numel()}

    def abort(self, reason: str) -> None:
        pass

    def close(self) -> None:
        self._pool.close()
