"""Requests, results, blocks and their events in a few arrays, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..blocks import BlockChange, BlockEvents, Chain, Digest
from ..core import AtomicRequest, AtomicResult, Float32Array, Int32Array
from ..errors import WorkerError

_DIGEST_BYTES = 16
_Dtype = TypeVar("_Dtype", bound=np.dtype[Any])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedRequests:
    """R requests in arrays. ``tokens``, ``positions`` and ``ids`` of all requests one after another; ``num_tokens``,
    ``num_positions``, ``vocabulary`` (0 or 1), ``top_k`` and ``salt`` (an index into ``salts``) [R]; ``num_ids`` has
    one entry an asked position.
    """

    tokens: Int32Array
    num_tokens: Int32Array
    positions: Int32Array
    num_positions: Int32Array
    ids: Int32Array
    num_ids: Int32Array
    vocabulary: Int32Array
    top_k: Int32Array
    salt: Int32Array
    salts: tuple[str, ...]

    @classmethod
    def pack(cls, requests: Sequence[AtomicRequest]) -> PackedRequests:
        salts = {request.salt: 0 for request in requests}
        for index, salt in enumerate(salts):
            salts[salt] = index
        return cls(
            tokens=_joined([r.tokens for r in requests]),
            num_tokens=_int32([len(r.tokens) for r in requests]),
            positions=_joined([r.positions for r in requests]),
            num_positions=_int32([len(r.positions) for r in requests]),
            ids=_joined([r.ids for r in requests]),
            num_ids=_joined([np.diff(r.id_offsets) for r in requests]),
            vocabulary=_int32([r.vocabulary for r in requests]),
            top_k=_int32([r.top_k for r in requests]),
            salt=_int32([salts[r.salt] for r in requests]),
            salts=tuple(salts),
        )

    def unpack(self) -> list[AtomicRequest]:
        """The requests; their arrays are views of the packed ones."""
        ends = np.cumsum(self.num_positions, dtype=np.int64).tolist()
        begins = [0, *ends][:-1]
        id_ends = np.concatenate([[0], np.cumsum(self.num_ids, dtype=np.int64)])
        if (ends or [0])[-1] != len(self.num_ids):
            raise WorkerError("a broken message: its asked positions do not add up")
        ids_of = [(id_ends[b : e + 1] - id_ends[b]).astype(np.int32) for b, e in zip(begins, ends, strict=True)]
        return [
            AtomicRequest(tokens, positions, ids, offsets, bool(vocabulary), top_k, self.salts[salt])
            for tokens, positions, ids, offsets, vocabulary, top_k, salt in zip(
                _split(self.tokens, self.num_tokens),
                _split(self.positions, self.num_positions),
                _split(self.ids, _int32([offsets[-1] for offsets in ids_of])),
                ids_of,
                self.vocabulary.tolist(),
                self.top_k.tolist(),
                self.salt.tolist(),
                strict=True,
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedResults:
    """R results in arrays: values of all one after another, and ``num_...`` [R] of each; -1 says None.

    A result's top-k arrays have ``num_top`` entries in rows of ``top_k``.
    """

    logits: Float32Array
    num_logits: Int32Array
    log_z: Float32Array
    num_log_z: Int32Array
    top_ids: Int32Array
    top_logprobs: Float32Array
    num_top: Int32Array
    top_k: Int32Array

    @classmethod
    def pack(cls, results: Sequence[AtomicResult]) -> PackedResults:
        tops = [r.top_ids for r in results if r.top_ids is not None]
        return cls(
            logits=_joined([r.logits for r in results], np.float32),
            num_logits=_int32([len(r.logits) for r in results]),
            log_z=_joined([r.log_z for r in results if r.log_z is not None], np.float32),
            num_log_z=_int32([-1 if r.log_z is None else len(r.log_z) for r in results]),
            top_ids=_joined([top.reshape(-1) for top in tops]),
            top_logprobs=_joined(
                [r.top_logprobs.reshape(-1) for r in results if r.top_logprobs is not None], np.float32
            ),
            num_top=_int32([-1 if r.top_ids is None else r.top_ids.size for r in results]),
            top_k=_int32([0 if r.top_ids is None else r.top_ids.shape[1] for r in results]),
        )

    def unpack(self) -> list[AtomicResult]:
        """The results; their arrays are views of the packed ones."""
        tops = zip(
            _split(self.top_ids, self.num_top),
            _split(self.top_logprobs, self.num_top),
            self.top_k.tolist(),
            strict=True,
        )
        return [
            AtomicResult(
                logits,
                log_z if has_log_z >= 0 else None,
                top_ids.reshape(-1, k) if has_top >= 0 else None,
                top_logprobs.reshape(-1, k) if has_top >= 0 else None,
            )
            for logits, log_z, has_log_z, (top_ids, top_logprobs, k), has_top in zip(
                _split(self.logits, self.num_logits),
                _split(self.log_z, self.num_log_z),
                self.num_log_z.tolist(),
                tops,
                self.num_top.tolist(),
                strict=True,
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedChains:
    """What a worker's pool has to know of R requests: ``digests`` of their blocks one after another, 4 numbers each,
    ``num_blocks`` [R], and ``shared_blocks`` [R], the leading ones that another unfinished request promises too.
    """

    digests: Int32Array
    num_blocks: Int32Array
    shared_blocks: Int32Array

    @classmethod
    def pack(cls, chains: Sequence[Chain], shared_blocks: Sequence[int]) -> PackedChains:
        return cls(
            digests=_packed_digests([digest for chain in chains for digest in chain]),
            num_blocks=_int32([len(chain) for chain in chains]),
            shared_blocks=_int32(shared_blocks),
        )

    def unpack(self) -> tuple[list[tuple[Digest, ...]], list[int]]:
        """The chains, and how many blocks of each are shared."""
        return _digests(self.digests, self.num_blocks), self.shared_blocks.tolist()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedEvents:
    """``blocks.BlockEvents`` with the digests of all changes one after another."""

    worker: int
    generation: int
    number: int
    snapshot: bool
    kinds: tuple[str, ...]
    num_blocks: Int32Array
    digests: Int32Array

    @classmethod
    def pack(cls, events: BlockEvents) -> PackedEvents:
        return cls(
            worker=events.worker,
            generation=events.generation,
            number=events.number,
            snapshot=events.snapshot,
            kinds=tuple(change.kind for change in events.changes),
            num_blocks=_int32([len(change.digests) for change in events.changes]),
            digests=_packed_digests([digest for change in events.changes for digest in change.digests]),
        )

    def unpack(self) -> BlockEvents:
        digests = _digests(self.digests, self.num_blocks)
        return BlockEvents(
            worker=self.worker,
            generation=self.generation,
            number=self.number,
            changes=tuple(BlockChange(kind, d) for kind, d in zip(self.kinds, digests, strict=True)),  # type: ignore[arg-type]
            snapshot=self.snapshot,
        )


def _packed_digests(digests: Sequence[Digest]) -> Int32Array:
    return np.frombuffer(b"".join(digests), "<i4").astype(np.int32, copy=False)


def _digests(packed: Int32Array, counts: Int32Array) -> list[tuple[Digest, ...]]:
    """Consecutive runs of ``counts`` digests."""
    data, size = packed.astype("<i4", copy=False).tobytes(), _DIGEST_BYTES
    if len(data) != size * int(counts.sum()):
        raise WorkerError(f"a broken message: {len(data)} bytes of digests where {int(counts.sum())} digests belong")
    every = [data[begin : begin + size] for begin in range(0, len(data), size)]
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    return [tuple(every[end - count : end]) for end, count in zip(ends, counts.tolist(), strict=True)]


def _int32(values: Sequence[Any]) -> Int32Array:
    return np.asarray(values, np.int32)


def _joined(arrays: Sequence[np.ndarray[Any, Any]], dtype: Any = np.int32) -> Any:
    return np.concatenate([*arrays, np.empty(0, dtype)]).astype(dtype, copy=False)


def _split(values: np.ndarray[Any, _Dtype], counts: Int32Array) -> Iterator[np.ndarray[Any, _Dtype]]:
    """Consecutive views of ``counts`` values (none where a count is negative); together they are all of them."""
    ends = np.cumsum(np.maximum(counts, 0), dtype=np.int64).tolist()
    if (ends or [0])[-1] != len(values):
        raise WorkerError(f"a broken message: {len(values)} values where {(ends or [0])[-1]} belong")
    begin = 0
    for end in ends:
        yield values[begin:end]
        begin = end
