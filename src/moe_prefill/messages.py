"""What the controller and its workers say to one another, and how it looks on a Unix socket. Torch-free.

A frame is ``magic, header bytes (uint32), payload bytes (uint64)``, a JSON header that names the message and its plain
fields, and a payload of little-endian arrays one after another, each starting at a multiple of 8 bytes. Requests and
results travel packed: some ten arrays a message, however many there are. Nothing is pickled, and what does not fit the
message's type is refused.
"""

from __future__ import annotations

import json
import struct
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np

from .config import EngineConfig
from .core import AtomicRequest, AtomicResult, EngineLimits, Float32Array, Int32Array, RunStats, Schedule
from .errors import WorkerError
from .forming import Forming

VERSION = 1  # of the messages: both sides come from one installation, and Hello proves it
_MAGIC = b"MoEP"
_PREFIX = struct.Struct("<4sIQ")
_MAX_HEADER, _MAX_PAYLOAD = 64 << 20, 64 << 30  # anything larger is a broken frame, not a message
_DTYPES: dict[Any, str] = {Int32Array: "<i4", Float32Array: "<f4"}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A worker's first message."""

    version: int
    rank: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Build the engine of one of ``size`` ranks. Their common store listens at ``store_port`` of the loopback."""

    config: EngineConfig
    size: int
    store_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """What is the same for every rank of a group."""

    limits: EngineLimits
    forming: Forming
    schedule: Schedule
    plan_digest: str
    peak_flops: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine is built. ``layer_s``: predicted seconds of one layer of a full sweep."""

    plan: EnginePlan
    layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Compute one sweep, possibly of no requests; ``number`` is its own, or its round's."""

    number: int
    requests: PackedRequests


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The results of one sweep, in the order of its requests, and the work that they took."""

    number: int
    results: PackedResults
    stats: RunStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The worker ends. ``code`` is the name of a class in ``errors``, or of any other exception."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Finish: nothing else will be asked."""


Message = Hello | Start | Ready | Score | Scored | Failure | Shutdown
_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Message)}


def encode(message: Message) -> list[bytes | memoryview]:
    """The frame of a message, as buffers to be sent one after another."""
    arrays: list[np.ndarray[Any, Any]] = []
    body = _plain(message, arrays)
    about = {"type": type(message).__name__, "body": body, "arrays": [[a.dtype.str, len(a)] for a in arrays]}
    header = json.dumps(about, ensure_ascii=False).encode("utf-8", "surrogatepass")
    parts: list[bytes | memoryview] = [b"", header]
    size = 0
    for array in arrays:
        if array.nbytes:
            parts += [memoryview(array.data).cast("B"), bytes(-array.nbytes % 8)]
        size += _padded(array.nbytes)
    parts[0] = _PREFIX.pack(_MAGIC, len(header), size)
    return parts


class Decoder:
    """Finds messages in a stream of bytes, whatever pieces it arrives in."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """The messages that ``data`` completes. Raises WorkerError for a broken frame."""
        self._held += data
        while len(self._held) >= _PREFIX.size:
            magic, header_bytes, payload_bytes = _PREFIX.unpack_from(self._held)
            if magic != _MAGIC or header_bytes > _MAX_HEADER or payload_bytes > _MAX_PAYLOAD:
                raise WorkerError(f"a broken message: it starts with {bytes(self._held[: _PREFIX.size]).hex()}")
            begin, end = _PREFIX.size + header_bytes, _PREFIX.size + header_bytes + payload_bytes
            if len(self._held) < end:
                return
            header, payload = bytes(self._held[_PREFIX.size : begin]), self._held[begin:end]
            del self._held[:end]
            yield _message(header, payload)


def _message(header: bytes, payload: bytearray) -> Message:
    try:
        about = json.loads(header.decode("utf-8", "surrogatepass"))
        kind = _TYPES[about["type"]]
        message: Message = _typed(kind, about["body"], list(_arrays(about["arrays"], payload)))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise WorkerError(f"a broken message: {type(error).__name__}: {error}") from error
    return message


def _arrays(shapes: list[tuple[str, int]], payload: bytearray) -> Iterator[np.ndarray[Any, Any]]:
    begin = 0
    for name, count in shapes:
        if name not in _DTYPES.values() or count < 0:
            raise ValueError(f"an array of {count} {name}")
        yield np.frombuffer(payload, name, count, begin)
        begin += _padded(4 * count)
    if begin != len(payload):
        raise ValueError(f"a payload of {len(payload)} bytes where the header describes {begin}")


def _plain(value: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    """JSON of a value; an array becomes its index in ``arrays``."""
    if isinstance(value, np.ndarray):
        arrays.append(np.ascontiguousarray(value, value.dtype.newbyteorder("<")))
        return len(arrays) - 1
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), arrays) for field in fields(value)}
    return value


def _typed(hint: Any, value: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    """A value of type ``hint`` from its JSON."""
    if hint in _DTYPES:
        array = arrays[value]
        if array.dtype.str != _DTYPES[hint]:
            raise TypeError(f"an array of {array.dtype.str} where {_DTYPES[hint]} belongs")
        return array
    if isinstance(hint, type) and is_dataclass(hint):
        hints = _hints(hint)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise TypeError(f"{value!r:.100} has not the fields of {hint.__name__}")
        return hint(**{name: _typed(hints[name], item, arrays) for name, item in value.items()})
    return tuple(value) if typing.get_origin(hint) is tuple else value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _padded(size: int) -> int:
    return -(-size // 8) * 8


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
