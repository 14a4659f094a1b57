"""What a plan is made from and what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..core import Level
from ..costmodel import Peer, Streaming
from ..memory import DeviceKind, MemoryPlan
from .levels import Levels, num_streamed, residency_map

Speed = Callable[[Levels, int, int], float]  # predicted tokens/s of a sweep of (tokens, rows of a chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one rank may use, in bytes, and how many ranks there are."""

    device_bytes: int
    host_bytes: int = 0  # that may be pinned
    ranks: int = 1
    kind: DeviceKind = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """What the user decides himself; None: the plan does. ``usual_chunk_rows``: what calibration found best, and where
    memory is short the plan may take less. ``kv_blocks``: blocks of prefix K and V that are kept.
    """

    residency: str | None = None
    max_sweep_tokens: int | None = None
    chunk_rows: int | None = None
    prefetch_depth: int | None = None
    usual_chunk_rows: int | None = None
    kv_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyPlan:
    """What one rank holds. ``levels`` has one entry a layer. ``device_bytes`` and ``host_bytes`` explain the totals by
    purpose.

    ``bank_buffers`` whole banks are kept for streamed layers; ``prefetch_depth`` of them (or of ``staged_shards``,
    where a level is hybrid) fill ahead of the one that is read. ``largest_sweep_tokens`` would fit at these levels,
    ``largest_streamed_tokens`` if every bank streamed that the host has room for, both with the smallest chunks.
    ``kv_blocks``: blocks of 16 tokens of the pool that keeps prefixes. ``remedy``: what was changed so that fewer banks
    are waited for, and what that is predicted to bring.
    """

    levels: Levels
    ranks: int
    dtype: str  # of activations and of everything but the experts
    bank_dtype: str
    bank_bytes: int
    shard_bytes: int
    prefetch_depth: int
    bank_buffers: int
    staged_shards: int
    kv_blocks: int
    sweep: MemoryPlan
    longest_request: int
    largest_sweep_tokens: int
    largest_streamed_tokens: int
    device_bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]
    budget: Budget
    remedy: str | None = None

    @property
    def peak_device_bytes(self) -> int:
        return sum(self.device_bytes.values())

    @property
    def peak_host_bytes(self) -> int:
        return sum(self.host_bytes.values())

    def streaming(self, peer: Peer) -> Streaming:
        """The same for the cost model; ``peer``: how shards come from the other ranks."""
        return Streaming(
            levels=self.levels,
            bank_bytes=self.bank_bytes,
            depth=max(1, self.bank_buffers),
            ranks=self.ranks,
            peer=peer,
        )

    @property
    def map(self) -> str:
        """One letter a layer, as ``--residency`` takes it."""
        return residency_map(self.levels)

    def count(self, level: Level) -> int:
        return self.levels.count(level)

    @property
    def num_streamed(self) -> int:
        return num_streamed(self.levels)
