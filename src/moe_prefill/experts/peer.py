"""The copy-engine transport: every rank keeps 1/N of each sharded bank where its peers can read it, and pulls what it
lacks. No collective, no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from .gather import Gather
from .lanes import Bytes, Lane
from .shared_memory import SharedBlock
from .transport import BytesByLink, Setup


class PeerTransport:
    """Every rank's shards lie in one block, layer after layer."""

    def __init__(self, layers: Sequence[int], setup: Setup) -> None:
        self._number = {layer: number for number, layer in enumerate(layers)}
        self._block = SharedBlock("banks/shards", len(layers) * setup.shard_bytes, setup.device, setup.ranks)
        self._gather = Gather(setup)
        self._aborted = False

    def place(self, layer: int) -> torch.Tensor:
        return nth_part(self._block.mine, self._number[layer], len(self._number))

    def fetch(self, layer: int, buffer: torch.Tensor, lane: Lane) -> BytesByLink:
        shards = [nth_part(block, self._number[layer], len(self._number)) for block in self._block.of]
        return self._gather.enqueue(buffer, shards, lane)

    def abort(self, reason: str) -> None:
        self._aborted = True

    def close(self) -> None:
        self._gather.close()
        self._block.close(wait=not self._aborted)


AnyBytes = TypeVar("AnyBytes", bound=Bytes)


def nth_part(block: AnyBytes, number: int, count: int) -> AnyBytes:
    """One of ``count`` equal parts of a block."""
    size = block.numel() // count
    return block[number * size : (number + 1) * size]  # type: ignore[return-value]
