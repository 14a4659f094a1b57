"""The gated activation in one pass. R rows, F channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 4096  # elements of a program
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def rounded_swiglu(gate, up, KIND: tl.constexpr):
    """``silu(gate) * up`` of float32 tiles in ``KIND``, with silu rounded to it first, as the reference does."""
    # ``exp2`` and ``rsqrt`` are one instruction each; ``exp`` and a division have cases that do not matter here.
    root = tl.rsqrt(1.0 + tl.exp2(gate * _MINUS_LOG2_E))
    silu = (gate * root * root).to(KIND).to(tl.float32)
    return (silu * up).to(KIND)


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, row_stride, R, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < R) & (column < F)
    source = x_ptr + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + column, rounded_swiglu(gate, up, out_ptr.dtype.element_ty), mask=inside)


def swiglu_kernel(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of rows that hold gate, then up; contiguous [R, F]."""
    R, F = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    assert gate_up_R2F.stride(1) == 1, gate_up_R2F.stride()
    out = torch.empty(R, F, dtype=gate_up_R2F.dtype, device=gate_up_R2F.device)
    if R:
        columns = _columns(F)
        rows = _TILE // columns
        grid = (triton.cdiv(R, rows), triton.cdiv(F, columns))
        _swiglu_kernel[grid](gate_up_R2F, out, gate_up_R2F.stride(0), R, F, ROWS=rows, COLUMNS=columns, num_warps=4)
    return out


def _columns(width: int) -> int:
    """The widest of a few tiles that leaves the least of the last one empty: 256 for 768 channels, 512 for 1536."""
    return min((1024, 512, 256), key=lambda columns: triton.cdiv(width, columns) * columns)
