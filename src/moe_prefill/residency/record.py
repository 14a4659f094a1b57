"""How the bytes of expert banks lie, wherever they live. Torch-free.

A bank is one contiguous run of bytes, expert after expert. An expert's record holds its matrices at aligned offsets,
so that any range of experts (a shard) is one contiguous range of bytes and one copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core import ModelSpec

RECORD_ALIGNMENT = 256  # bytes; what a device allocation is aligned to, and more than any kernel asks for
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class RecordField:
    """One matrix or vector of an expert: ``shape`` without the expert, ``offset`` in bytes from the record's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """The bytes of one expert; ``num_bytes`` is a multiple of ``RECORD_ALIGNMENT``."""

    fields: tuple[RecordField, ...]
    num_bytes: int


def expert_record(spec: ModelSpec, dtype: str, *, row_scales: bool = True) -> ExpertRecord:
    """How an expert of this model lies in memory when its matrices are stored as ``dtype``.

    ``gate_up`` [2I, D] and ``down`` [D, I]; float8 matrices bring float32 scales a row, ``gate_up_scale`` [2I] and
    ``down_scale`` [D], which so travel in the same copy, unless their scales are kept elsewhere (``row_scales``).
    """
    hidden, size = spec.hidden_size, spec.expert_size
    parts: list[tuple[str, str, tuple[int, ...]]] = [
        ("gate_up", dtype, (2 * size, hidden)),
        ("down", dtype, (hidden, size)),
    ]
    if dtype == "float8_e4m3fn" and row_scales:
        parts += [("gate_up_scale", "float32", (2 * size,)), ("down_scale", "float32", (hidden,))]
    fields, offset = [], 0
    for name, kind, shape in parts:
        field = RecordField(name, kind, shape, offset)
        fields.append(field)
        offset += aligned(field.num_bytes)
    return ExpertRecord(tuple(fields), offset)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def bank_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of one layer's whole bank."""
    return spec.num_experts * expert_record(spec, dtype).num_bytes


def block_scale_bytes(spec: ModelSpec) -> int:
    """Bytes of the scales of one layer's blocks: float32, two grids of three matrices an expert (``ops.experts``)."""
    blocks = -(-spec.expert_size // 128) * -(-spec.hidden_size // 128)
    return spec.num_experts * 2 * 3 * blocks * 4


def shard_of(num_experts: int, rank: int, size: int) -> range:
    """The experts that a rank of ``size`` keeps: contiguous, in order of ranks, their numbers differ by at most one."""
    return range(rank * num_experts // size, (rank + 1) * num_experts // size)


def shard_bytes(spec: ModelSpec, dtype: str, size: int) -> int:
    """Bytes of the largest shard of one layer."""
    most = max(len(shard_of(spec.num_experts, rank, size)) for rank in range(size))
    return most * expert_record(spec, dtype).num_bytes
