"""K and V of prefixes that outlive a sweep: 16-token blocks of every layer, in slots that are found by digest.

A sweep's segments lie in its K and V as if all of them had been computed; of a layer, the rows of a hit are copied in
from the pool and new blocks are copied out to it. Both go by row numbers that were uploaded with the plan, in the order
of the compute stream. So the bookkeeping of a sweep is done when it is enqueued: whatever is enqueued later finds its
blocks, and a slot that is given away is read before it is written again.

Letters: L layers, N rows of the pool (16 a block), G key/value heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..blocks import BLOCK_TOKENS, BlockHasher, BlockPool, Digest, HashedSweep, usable_blocks
from ..core import AtomicRequest, Int64Array, ModelSpec
from ..forest import Forest


@dataclass(frozen=True, slots=True, eq=False)
class SweepBlocks:
    """What a sweep reads from the pool and leaves there. ``slots``: of each request, those of the blocks of its hit.
    ``new``: digests; ``new_request``, ``new_block`` and ``new_slot`` [B]: a request that has the block, its index in
    that request's chain, and where it goes.
    """

    slots: Sequence[Sequence[int]]
    new: Sequence[Digest]
    new_request: Int64Array
    new_block: Int64Array
    new_slot: Int64Array

    @property
    def held(self) -> Int64Array:
        """Tokens of each request's hit, [R]."""
        return BLOCK_TOKENS * np.asarray([len(slots) for slots in self.slots], np.int64)

    def read_from(self, forest: Forest, rows: Int64Array) -> Int64Array:
        """Where in the pool the K and V of packed ``rows`` lie, which no request computes."""
        ends = np.cumsum([len(slots) for slots in self.slots])
        flat = np.concatenate([np.asarray(slots, np.int64) for slots in self.slots])
        request = forest.request_of[forest.segment_of_rows(rows)]
        block, inside = np.divmod(forest.positions[rows].astype(np.int64), BLOCK_TOKENS)
        begin = ends[request] - np.asarray([len(slots) for slots in self.slots])[request]
        where: Int64Array = flat[begin + block] * BLOCK_TOKENS + inside
        return where

    def written(self, forest: Forest) -> tuple[Int64Array, Int64Array]:
        """Packed rows of the new blocks, and where in the pool they go."""
        inside = np.arange(BLOCK_TOKENS)
        positions = (self.new_block[:, None] * BLOCK_TOKENS + inside).reshape(-1)
        rows = forest.rows_of(np.repeat(self.new_request, BLOCK_TOKENS), positions)
        return rows, (self.new_slot[:, None] * BLOCK_TOKENS + inside).reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class RowCopy:
    """Rows of a sweep's K and V and as many of the pool's, int64 on the device."""

    rows: torch.Tensor
    pool: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PoolCopies:
    """What every layer copies from the pool before its attention, and to it; in pieces, which bounds the workspace."""

    reads: tuple[RowCopy, ...]
    writes: tuple[RowCopy, ...]


class PoolTensors:
    """K and V [L, N, 2, G, d] in the dtype of activations."""

    def __init__(self, spec: ModelSpec, num_blocks: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (spec.num_layers, num_blocks * BLOCK_TOKENS, 2, spec.num_kv_heads, spec.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=device)

    def exchange(self, layer: int, copies: PoolCopies, kv_T2Gd: torch.Tensor) -> None:
        """Put the rows of hits into a layer's K and V, and keep those of new blocks."""
        mine = self.kv[layer]
        for copy in copies.reads:
            kv_T2Gd.index_copy_(0, copy.rows, mine.index_select(0, copy.pool))
        for copy in copies.writes:
            mine.index_copy_(0, copy.pool, kv_T2Gd.index_select(0, copy.rows))


class PrefixPool:
    """The pool of one engine: bookkeeping and tensors. ``private_beyond``: requests of more tokens share nothing."""

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        worker: int = 0,
        private_beyond: int | None = None,
    ) -> None:
        self.blocks = BlockPool(worker, num_blocks)
        self.tensors = PoolTensors(spec, num_blocks, dtype=dtype, device=device)
        self._hasher = BlockHasher("")
        self._private_beyond = private_beyond

    def take(self, requests: Sequence[AtomicRequest]) -> SweepBlocks:
        """Find the hits of a sweep that is about to be enqueued, and slots for the blocks that it leaves. It is hashed
        here where nobody has done so.
        """
        sweep = requests
        if not isinstance(sweep, HashedSweep):
            sweep = HashedSweep.of(requests, self._hasher, self._private_beyond)
        blocks, chains = self.blocks, sweep.chains
        limits = [usable_blocks(request) for request in sweep.requests]
        hits = [chain[: blocks.match(chain, limit)] for chain, limit in zip(chains, limits, strict=True)]
        for hit in hits:
            blocks.hold(hit)
        new = blocks.store(chains, sweep.shared)
        for hit in hits:
            blocks.release(hit)
        found = _first_places(sweep, set(new))
        places = np.asarray([found[digest] for digest in new], np.int64).reshape(-1, 2)
        slots = [blocks.slots(hit) for hit in hits]
        return SweepBlocks(slots, new, places[:, 0], places[:, 1], np.asarray(blocks.slots(new), np.int64))

    def give_up(self, taken: SweepBlocks) -> None:
        """The sweep was not enqueued: what it should have left is not there."""
        self.blocks.discard(taken.new)


def _first_places(sweep: HashedSweep, wanted: set[Digest]) -> dict[Digest, tuple[int, int]]:
    """A request that has the block, and the block's index there."""
    found: dict[Digest, tuple[int, int]] = {}
    for request, chain in enumerate(sweep.chains):
        for index, digest in enumerate(chain):
            if digest in wanted:
                found.setdefault(digest, (request, index))
    return found
