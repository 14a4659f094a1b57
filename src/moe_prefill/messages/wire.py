"""How a message looks on the socket.

A frame is ``magic, header bytes (uint32), payload bytes (uint64)``, a JSON header that names the message and its plain
fields, and a payload of little-endian arrays one after another, each starting at a multiple of 8 bytes. Nothing is
pickled, and what does not fit the message's type is refused.
"""

from __future__ import annotations

import json
import struct
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import numpy as np

from ..core import Float32Array, Int32Array
from ..errors import WorkerError
from .kinds import TYPES, Message

_MAGIC = b"MoEP"
_PREFIX = struct.Struct("<4sIQ")
_MAX_HEADER, _MAX_PAYLOAD = 64 << 20, 64 << 30  # anything larger is a broken frame, not a message
_DTYPES: dict[Any, str] = {Int32Array: "<i4", Float32Array: "<f4"}


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
        kind = TYPES[about["type"]]
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
    if isinstance(value, tuple):
        return [_plain(item, arrays) for item in value]
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
    if typing.get_origin(hint) is tuple:
        return tuple(_typed(typing.get_args(hint)[0], item, arrays) for item in value)
    if isinstance(hint, types.UnionType) and value is not None:  # of one type and None
        return _typed(next(kind for kind in typing.get_args(hint) if kind is not types.NoneType), value, arrays)
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _padded(size: int) -> int:
    return -(-size // 8) * 8
