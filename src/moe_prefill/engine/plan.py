"""A sweep as data: the packed batch, its attention calls, its chunks and what is read at the end. Built on the host,
uploaded once.

Letters: T computed rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from ..core import AtomicRequest, BoolArray, Int32Array, Int64Array, ModelSpec
from ..costmodel import sweep_flops
from ..forest import Forest, SharingRule, build_forest
from ..memory import MemoryPlan
from ..models.rope import inverse_frequencies
from ..ops import Spans
from .head import HeadPlan, HeadStager, ReadPlan
from .kv import PoolCopies, RowCopy, SweepBlocks
from .layout import AttentionCall, Chunk, Runs, all_runs, as_slice, asked_runs, chunks
from .staging import Staged, Staging, Uploaded


@dataclass(frozen=True, slots=True, eq=False)
class DeviceCall:
    """An AttentionCall whose arrays are on the device, but for ``merged``. ``rows``: its queries among the chunk's."""

    rows: slice
    spans: Spans
    keys: slice | torch.Tensor
    causal: bool
    window: int | None
    merged: BoolArray


@dataclass(frozen=True, slots=True, eq=False)
class DeviceChunk:
    """Rows that go through the rest of a layer together: where they come from (``rows``) and go to (``target``)."""

    rows: slice | torch.Tensor
    target: slice
    diagonal: tuple[DeviceCall, ...]
    levels: tuple[DeviceCall, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RowBlock:
    """Rows of the residual whose K and V are computed together, and where these go among the keys."""

    rows: slice
    keys: slice | torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SweepPlan:
    """Everything that one pass over all layers needs besides the weights. ``num_rows`` are computed; a layer has K and
    V of all the forest's rows, of which ``pool`` (None: there is none) brings the others and takes the new ones.
    """

    forest: Forest
    num_rows: int
    tokens: torch.Tensor
    positions: torch.Tensor
    rope: RopeRows
    row_blocks: tuple[RowBlock, ...]
    pool: PoolCopies | None
    chunks_by_window: dict[int | None, tuple[DeviceChunk, ...]]
    last_chunks: tuple[DeviceChunk, ...]
    last_rows: int
    candidates: HeadPlan | None
    vocabulary: HeadPlan | None
    reads: tuple[ReadPlan, ...]
    flops: int


def build_sweep_plan(
    requests: Sequence[AtomicRequest],
    salts: Sequence[str],
    spec: ModelSpec,
    rule: SharingRule,
    memory: MemoryPlan,
    device: torch.device,
    *,
    prune_last: bool,
    cores: int = 1,
    blocks: SweepBlocks | None = None,
) -> SweepPlan:
    """Plan a sweep over ``requests``; ``salts`` says who may share with whom, ``blocks`` what the pool has of it. Host
    work only, plus one asynchronous upload. Chunks are cut so that ``cores`` of them can run side by side.
    """
    forest = build_forest([request.tokens for request in requests], rule, salts)
    staging = Staging()
    asked = _asked_rows(forest, requests)
    read = asked_runs(forest, np.unique(asked))
    computed = _computed_runs(forest, requests, read, blocks)
    carried = read if prune_last else computed
    windows = {layer.window for layer in spec.layers[:-1]}
    rows = rows_of_chunk(spec, memory.chunk_rows, computed.num_rows, cores)
    cut: _Cut = {"levels": rule.levels, "max_rows": rows, "max_keys": memory.max_gathered_keys, "computed": computed}
    everywhere = {w: chunks(forest, computed, window=w, **cut) for w in windows}
    last = chunks(forest, carried, window=spec.layers[-1].window, **cut)
    residual = computed.rows()
    positions = forest.positions[residual]
    staged_tokens, staged_positions = staging.add(forest.tokens[residual]), staging.add(positions)
    staged_blocks = [(block, _stage_rows(staging, residual[block])) for block in _blocks(len(residual), rows)]
    staged_pool = None if blocks is None else _stage_pool(staging, forest, residual, blocks, rows)
    staged_everywhere = {window: [_stage_chunk(staging, c) for c in cs] for window, cs in everywhere.items()}
    staged_last = [_stage_chunk(staging, chunk) for chunk in last]
    head = HeadStager(requests, asked, carried.rows(), memory.logits_block_bytes, spec.vocab_size)
    candidates, vocabulary = head.stage(staging, vocabulary=False), head.stage(staging, vocabulary=True)
    rope = _stage_rope(staging, forest, residual, requests, spec)
    on_device = staging.upload(device)
    return SweepPlan(
        forest=forest,
        num_rows=len(residual),
        tokens=on_device[staged_tokens],
        positions=on_device[staged_positions],
        rope=rope.on(on_device),
        row_blocks=tuple(RowBlock(block, _on(on_device, keys)) for block, keys in staged_blocks),
        pool=None if staged_pool is None else staged_pool.on(on_device),
        chunks_by_window={
            w: _longest_first(_device_chunks(on_device, cs), everywhere[w], positions, cores)
            for w, cs in staged_everywhere.items()
        },
        last_chunks=_longest_first(_device_chunks(on_device, staged_last), last, positions, cores),
        last_rows=carried.num_rows,
        candidates=None if candidates is None else candidates.on(on_device),
        vocabulary=None if vocabulary is None else vocabulary.on(on_device),
        reads=head.reads(),
        flops=sweep_flops(spec, positions, forest.positions[carried.rows()], head.rows_read()),
    )


def _computed_runs(forest: Forest, requests: Sequence[AtomicRequest], read: Runs, blocks: SweepBlocks | None) -> Runs:
    """All but what lies in the pool; what is ``read`` in the end is computed anyway."""
    if blocks is None or not blocks.held.any():
        return all_runs(forest)
    lengths = np.asarray([len(request.tokens) for request in requests])
    return asked_runs(forest, np.union1d(forest.needed_rows(lengths, blocks.held), read.rows()))


class _Cut(TypedDict):
    """How ``layout.chunks`` cuts."""

    levels: int
    max_rows: int
    max_keys: int
    computed: Runs


def rows_of_chunk(spec: ModelSpec, most: int, tokens: int, cores: int) -> int:
    """Rows of a chunk: ``most`` on one core. On several, which have a chunk each at a time, these are ``most`` together
    and every core gets as many, but enough that an expert's product has some 64 rows.
    """
    if cores == 1:
        return most
    worthwhile = 64 * spec.num_experts // spec.top_k
    rounds = -(-tokens // max(most, cores * worthwhile))
    return min(most, max(worthwhile, -(-tokens // (cores * rounds))))


def _longest_first(
    on_device: tuple[DeviceChunk, ...], chunks: Sequence[Chunk], positions: Int32Array, cores: int
) -> tuple[DeviceChunk, ...]:
    """On several cores, the order in which these have finished most nearly together: of as many rows, those that see
    most keys first.
    """
    if cores == 1:
        return on_device
    keys = [int(positions[chunk.rows].sum(dtype=np.int64)) for chunk in chunks]
    return tuple(on_device[index] for index in np.argsort([-count for count in keys], kind="stable"))


def _asked_rows(forest: Forest, requests: Sequence[AtomicRequest]) -> Int64Array:
    """Packed row of every asked position, request by request."""
    counts = [len(request.positions) for request in requests]
    owner = np.repeat(np.arange(len(requests)), counts)
    return forest.rows_of(owner, np.concatenate([request.positions for request in requests]).astype(np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class RopeRows:
    """Inverse frequencies float32 [n, r / 2], which of them a row uses (int64 [T], None: all the first), and the
    scale of the tables.
    """

    inv_freq: torch.Tensor
    row: torch.Tensor | None
    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class _StagedRope:
    inv_freq: Staged
    count: int
    row: Staged | None
    factor: float

    def on(self, device: Uploaded) -> RopeRows:
        return RopeRows(
            device[self.inv_freq].view(self.count, -1), None if self.row is None else device[self.row], self.factor
        )


def _stage_rope(
    staging: Staging, forest: Forest, residual: Int64Array, requests: Sequence[AtomicRequest], spec: ModelSpec
) -> _StagedRope:
    """Dynamic rope stretches with the request's length; such requests share nothing, so a segment has one length."""
    plain, factor = inverse_frequencies(spec.rope, None)
    if spec.rope.kind != "dynamic":
        return _StagedRope(staging.add(plain.numpy()), 1, None, factor)
    lengths = np.asarray([len(requests[r].tokens) for r in forest.request_of], np.int64)
    distinct, kind = np.unique(np.maximum(lengths, spec.rope.original_max_positions), return_inverse=True)
    tables = np.concatenate([inverse_frequencies(spec.rope, int(length))[0].numpy() for length in distinct])
    rows = np.repeat(kind.astype(np.int64), forest.stop - forest.start)[residual]
    return _StagedRope(staging.add(tables), len(distinct), staging.add(rows), factor)


def _blocks(total: int, size: int) -> tuple[slice, ...]:
    """Near-equal parts of at most ``size``; none of nothing."""
    count = max(1, -(-total // size))
    edges = [index * total // count for index in range(count + 1)]
    return tuple(slice(low, high) for low, high in itertools.pairwise(edges) if high > low)


def _stage_rows(staging: Staging, rows: Int64Array) -> slice | Staged:
    found = as_slice(rows)
    return found if isinstance(found, slice) else staging.add(found)


def _on(device: Uploaded, rows: slice | Staged) -> slice | torch.Tensor:
    return rows if isinstance(rows, slice) else device[rows]


@dataclass(frozen=True, slots=True, eq=False)
class _StagedPool:
    """Pairs of packed rows and rows of the pool."""

    reads: list[tuple[Staged, Staged]]
    writes: list[tuple[Staged, Staged]]

    def on(self, device: Uploaded) -> PoolCopies:
        reads, writes = (
            tuple(RowCopy(device[rows], device[pool]) for rows, pool in pairs) for pairs in (self.reads, self.writes)
        )
        return PoolCopies(reads, writes)


def _stage_pool(staging: Staging, forest: Forest, residual: Int64Array, blocks: SweepBlocks, most: int) -> _StagedPool:
    """Rows to copy, at most about ``most`` at a time."""
    stored = np.setdiff1d(np.arange(forest.num_tokens), residual, assume_unique=True)
    pairs = (stored, blocks.read_from(forest, stored)), blocks.written(forest)
    reads, writes = (
        [(staging.add(rows[part]), staging.add(pool[part])) for part in _blocks(len(rows), most)]
        for rows, pool in pairs
    )
    return _StagedPool(reads, writes)


@dataclass(frozen=True, slots=True, eq=False)
class _StagedCall:
    call: AttentionCall
    cu_q: Staged
    cu_k: Staged
    keys: slice | Staged

    def on(self, device: Uploaded) -> DeviceCall:
        call = self.call
        spans = Spans(call.cu_q, call.cu_k, device[self.cu_q], device[self.cu_k], call.max_q, call.max_k)
        keys = _on(device, self.keys)
        rows = slice(call.first_row, call.first_row + call.num_rows)
        return DeviceCall(rows, spans, keys, call.causal, call.window, call.merged)


@dataclass(frozen=True, slots=True, eq=False)
class _StagedChunk:
    chunk: Chunk
    rows: slice | Staged
    diagonal: tuple[_StagedCall, ...]
    levels: tuple[_StagedCall, ...]


def _stage_call(staging: Staging, call: AttentionCall) -> _StagedCall:
    keys = call.keys if isinstance(call.keys, slice) else staging.add(call.keys)
    return _StagedCall(call, staging.add(call.cu_q), staging.add(call.cu_k), keys)


def _stage_chunk(staging: Staging, chunk: Chunk) -> _StagedChunk:
    rows = chunk.rows if isinstance(chunk.rows, slice) else staging.add(chunk.rows)
    diagonal = tuple(_stage_call(staging, call) for call in chunk.diagonal)
    return _StagedChunk(chunk, rows, diagonal, tuple(_stage_call(staging, call) for call in chunk.levels))


def _device_chunks(device: Uploaded, staged: Sequence[_StagedChunk]) -> tuple[DeviceChunk, ...]:
    done, out = 0, []
    for item in staged:
        rows = _on(device, item.rows)
        target = slice(done, done + item.chunk.num_rows)
        diagonal, levels = (tuple(call.on(device) for call in calls) for calls in (item.diagonal, item.levels))
        out.append(DeviceChunk(rows, target, diagonal, levels))
        done = target.stop
    return tuple(out)
