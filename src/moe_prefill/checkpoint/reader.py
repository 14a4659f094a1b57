"""Bytes of a checkpoint straight into the tensors that keep them.

Host memory beside the destinations: nothing where the destination is a CPU tensor of the stored type, else one bounce
buffer of ``BOUNCE_BYTES`` (page-locked for CUDA), whatever the size of a tensor.
"""

from __future__ import annotations

import math
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import ModelError
from .headers import SIZES, Checkpoint, TensorEntry

BOUNCE_BYTES = 64 * 1024 * 1024
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class PieceReader:
    """Copies rows of stored tensors into destinations; keeps one file open, so read in file order."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: FileIO | None = None
        self._bounce: torch.Tensor | None = None

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._path = self._file = self._bounce = None

    def copy_rows(self, entry: TensorEntry, rows: range, destination: torch.Tensor) -> None:
        """Fill ``destination`` [len(rows), ...] with these rows of the stored tensor, converting its type."""
        assert tuple(destination.shape) == (len(rows), *entry.shape[1:]), (entry, rows, tuple(destination.shape))
        row_bytes = math.prod(entry.shape[1:]) * SIZES[entry.dtype]
        at = entry.begin + rows.start * row_bytes
        dtype = DTYPES[entry.dtype]
        if destination.device.type == "cpu" and destination.dtype == dtype and destination.is_contiguous():
            self._fill(entry, at, destination)
            return
        step = max(1, BOUNCE_BYTES // max(row_bytes, 1))
        for first in range(0, len(rows), step):
            part = destination[first : first + step]
            staged = self._staging(max(row_bytes * len(part), 1), destination.device)[: row_bytes * len(part)]
            self._fill(entry, at + first * row_bytes, staged)
            part.copy_(staged.view(dtype).view(part.shape))

    def _staging(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        if self._bounce is None or self._bounce.numel() < num_bytes:
            self._bounce = torch.empty(
                max(num_bytes, BOUNCE_BYTES if device.type == "cuda" else 0),
                dtype=torch.uint8,
                pin_memory=device.type == "cuda",
            )
        return self._bounce

    def _fill(self, entry: TensorEntry, at: int, target: torch.Tensor) -> None:
        """Read the bytes from ``at`` on into a contiguous CPU tensor."""
        buffer: Any = target.reshape(-1).view(torch.uint8).numpy() if target.numel() else b""
        view = memoryview(buffer)
        file = self._open(entry.path)
        file.seek(at)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise ModelError(f"{entry.path} ended after byte {at + done:,} while {entry.name} was read.")
            done += count

    def _open(self, path: Path) -> FileIO:
        if self._file is None or self._path != path:
            if self._file is not None:
                self._file.close()
            self._file, self._path = FileIO(path, "rb"), path
        return self._file


def same_values(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors have the same type, shape and bytes; reads both, a buffer at a time."""
    first, second = checkpoint.entries[one], checkpoint.entries[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.path.open("rb") as left, second.path.open("rb") as right:
        left.seek(first.begin)
        right.seek(second.begin)
        for done in range(0, first.num_bytes, BOUNCE_BYTES):
            size = min(BOUNCE_BYTES, first.num_bytes - done)
            if left.read(size) != right.read(size):
                return False
    return True
