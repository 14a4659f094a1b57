"""Headers of safetensors files: what a checkpoint holds, checked before a single weight is read.

A file is 8 bytes of length, that much JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ModelError

# Bytes an element, of the types that the format knows.
SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
SPELLING: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}
SCALE_SUFFIX = "_scale_inv"  # of the tensor that holds another's scales, see ``scales``
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file: ``dtype`` in the format's spelling, ``begin`` the byte offset from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a directory by name, file by file and in the order of their bytes."""

    directory: Path
    entries: Mapping[str, TensorEntry]

    @property
    def dtype(self) -> Literal["float32", "bfloat16", "float16"] | None:
        """The first floating-point type met, in torch's spelling: what the weights were saved in."""
        stored = (entry.dtype for name, entry in self.entries.items() if not name.endswith(SCALE_SUFFIX))
        return next((SPELLING[dtype] for dtype in stored if dtype in SPELLING), None)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and check the headers of ``model.safetensors``, or of the shards that its index names.

    ModelError: no such file (with the remedy for pickle and adapter directories), a missing shard, a damaged header, a
    file whose size is not what its header says, a tensor that the index promises and no shard holds.
    """
    entries: dict[str, TensorEntry] = {}
    index = _read_index(directory) if not (directory / WEIGHTS).exists() else {}
    for path in _shards(directory, index):
        for entry in read_header(path):
            if entry.name in entries:
                raise ModelError(f"tensor {entry.name} is in two files: {entries[entry.name].path} and {path}.")
            entries[entry.name] = entry
    absent = [name for name in index if name not in entries or entries[name].path.name != index[name]]
    if absent:
        raise ModelError(
            f"{directory / INDEX} lists {len(absent)} tensors that are not in the file it names, "
            f"first {absent[0]} in {index[absent[0]]}. Download the checkpoint again."
        )
    return Checkpoint(directory, entries)


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one file, in the order of their bytes; ModelError where the file is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(
                f"{path} is a Git LFS pointer, not the file; fetch it with `git lfs pull` in {path.parent}"
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER or 8 + length > size:
            raise _damaged(path, f"its header is said to take {length:,} bytes, the file has {size:,}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except ValueError as problem:
        raise _damaged(path, f"its header of {length:,} bytes is not JSON ({problem})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    header.pop("__metadata__", None)
    entries = sorted((_entry(path, name, fields, 8 + length) for name, fields in header.items()), key=_begin)
    _check_cover(path, entries, 8 + length, size)
    return entries


def _begin(entry: TensorEntry) -> tuple[int, int]:
    return entry.begin, entry.num_bytes


def _entry(path: Path, name: str, fields: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"its header describes tensor {name} as {str(fields)[:120]}") from None
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"tensor {name} has shape {list(shape)} and offsets {begin}, {end}")
    if dtype not in SIZES:
        raise ModelError(f"{path}: tensor {name} has type {dtype!r}; known types: {', '.join(SIZES)}.")
    if end - begin != math.prod(shape) * SIZES[dtype]:
        needed = math.prod(shape) * SIZES[dtype]
        raise _damaged(path, f"tensor {name} {list(shape)} of {dtype} needs {needed:,} bytes and has {end - begin:,}")
    return TensorEntry(name, dtype, shape, path, base + begin, end - begin)


def _check_cover(path: Path, entries: list[TensorEntry], base: int, size: int) -> None:
    """Tensors follow one another without gap or overlap and end where the file ends."""
    at = base
    for entry in entries:
        if entry.begin != at:
            raise _damaged(path, f"tensor {entry.name} begins at byte {entry.begin:,}, the one before ends at {at:,}")
        at += entry.num_bytes
    if at != size:
        fault = "truncated" if size < at else "longer than its header says"
        raise _damaged(path, f"the file is {fault}: it has {size:,} bytes, its header needs {at:,}")


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX
    if not path.exists():
        raise _no_weights(directory)
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as problem:
        raise ModelError(f"{path} is not an index of safetensors shards ({problem!r}).") from None
    plain = isinstance(weight_map, dict) and all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    )
    if not plain or not weight_map:
        raise ModelError(f"{path}: weight_map must give each tensor the name of a file in the same directory.")
    return dict(weight_map)


def _shards(directory: Path, index: Mapping[str, str]) -> list[Path]:
    if not index:
        return [directory / WEIGHTS]
    names = sorted(set(index.values()))
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}. "
            "Download the checkpoint again."
        )
    return [directory / name for name in names]


def _no_weights(directory: Path) -> ModelError:
    found = sorted(path.name for path in directory.iterdir() if path.is_file())
    text = f"{directory} has neither {WEIGHTS} nor {INDEX}"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        return ModelError(
            f"{text}, only pickle files, which can run code when they are read. "
            "Save the model again with transformers: model.save_pretrained(directory) writes safetensors."
        )
    if "adapter_config.json" in found:
        return ModelError(f"{text}, only an adapter. Merge it into its base model and save that.")
    return ModelError(f"{text}; it holds {', '.join(found[:8]) or 'no files'}.")


def _damaged(path: Path, fault: str) -> ModelError:
    return ModelError(f"{path} is damaged: {fault}. Download or copy the file again.")
