"""Bytes of a checkpoint straight into the tensors that keep them.

Host memory beside the destinations: nothing where the destination is a CPU tensor of the stored type, else one bounce
buffer of ``BOUNCE_BYTES`` (page-locked for CUDA), whatever the size of a tensor. Float8 tensors with block scales are
widened by the device that the destination names, ``SCALED_BYTES`` (or one expert) at a time, unless it keeps them as
they are.
"""

from __future__ import annotations

import math
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import ModelError
from ..ops import BLOCK, FLOAT8, dequantize_blocks
from .headers import SIZES, Checkpoint, TensorEntry
from .scales import BlockScales, check_scales
from .slots import BlockTarget

BOUNCE_BYTES = 64 * 1024 * 1024
SCALED_BYTES = 8 * 1024 * 1024
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class PieceReader:
    """Copies rows of stored tensors into destinations; keeps two files open, of tensors and of scales, so read in file
    order.
    """

    def __init__(self) -> None:
        self._files: dict[bool, FileIO] = {}
        self._bounce: torch.Tensor | None = None

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files, self._bounce = {}, None

    def copy_rows(
        self, entry: TensorEntry, rows: range, destination: torch.Tensor, scales: BlockScales | None = None
    ) -> None:
        """Fill ``destination`` [len(rows), ...] with these rows of the stored tensor, converting its type. A float8
        tensor comes with its ``scales``; ModelError where these are not finite.
        """
        assert tuple(destination.shape) == (len(rows), *entry.shape[1:]), (entry, rows, tuple(destination.shape))
        if scales is not None:
            self._copy_scaled(entry, rows, destination, scales)
            return
        row_bytes = math.prod(entry.shape[1:]) * SIZES[entry.dtype]
        at = entry.begin + rows.start * row_bytes
        dtype = DTYPES[entry.dtype]
        if destination.device.type == "cpu" and destination.dtype == dtype and destination.is_contiguous():
            self._fill(entry, at, destination)
            return
        step = max(1, BOUNCE_BYTES // max(row_bytes, 1))
        step -= step % BLOCK if step > BLOCK else 0  # destinations may take whole blocks of rows only
        for first in range(0, len(rows), step):
            part = destination[first : first + step]
            staged = self._staging(max(row_bytes * len(part), 1), destination.device)[: row_bytes * len(part)]
            self._fill(entry, at + first * row_bytes, staged)
            part.copy_(staged.view(dtype).view(part.shape))

    def _copy_scaled(self, entry: TensorEntry, rows: range, destination: torch.Tensor, scales: BlockScales) -> None:
        """Pieces of whole matrices where the tensor is a stack of them, else of whole blocks."""
        grid, is_stack = self._read_scales(scales.entry), len(entry.shape) > 2
        assert is_stack or rows.start % BLOCK == 0, (entry, rows)
        row_bytes, unit = math.prod(entry.shape[1:]), 1 if is_stack else BLOCK
        step = max(1, SCALED_BYTES // max(row_bytes * unit, 1)) * unit
        for first in range(rows.start, rows.stop, step):
            last = min(first + step, rows.stop)
            part = destination[first - rows.start : last - rows.start]
            staged = self._staging(max(row_bytes * len(part), 1), destination.device)[: row_bytes * len(part)]
            self._fill(entry, entry.begin + first * row_bytes, staged)
            values, scale = staged.view(FLOAT8).view(part.shape), grid[first // unit : -(-last // unit)]
            if isinstance(part, BlockTarget):
                part.copy_blocks(values, scale)
            else:
                device = destination.device
                part.copy_(dequantize_blocks(values.to(device), scale.to(device), scales.parts))

    def _read_scales(self, entry: TensorEntry) -> torch.Tensor:
        """All scales of a tensor, float32."""
        stored = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._fill(entry, entry.begin, stored, is_scale=True)
        check_scales(entry.name, stored)
        return stored.float()

    def _staging(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        if self._bounce is None or self._bounce.numel() < num_bytes:
            self._bounce = torch.empty(
                max(num_bytes, BOUNCE_BYTES if device.type == "cuda" else 0),
                dtype=torch.uint8,
                pin_memory=device.type == "cuda",
            )
        return self._bounce

    def _fill(self, entry: TensorEntry, at: int, target: torch.Tensor, *, is_scale: bool = False) -> None:
        """Read the bytes from ``at`` on into a contiguous CPU tensor."""
        buffer: Any = target.reshape(-1).view(torch.uint8).numpy() if target.numel() else b""
        view = memoryview(buffer)
        file = self._open(entry.path, is_scale)
        file.seek(at)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise ModelError(f"{entry.path} ended after byte {at + done:,} while {entry.name} was read.")
            done += count

    def _open(self, path: Path, is_scale: bool) -> FileIO:
        file = self._files.get(is_scale)
        if file is None or file.name != path:
            if file is not None:
                file.close()
            file = self._files[is_scale] = FileIO(path, "rb")
        return file


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
