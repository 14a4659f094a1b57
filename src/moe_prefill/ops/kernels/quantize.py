"""Rows to float8 in one pass, alone or after the gated activation, with a scale a row or one for each 128 channels.
R rows, C or F channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .swiglu import rounded_swiglu

_ROWS = 32  # whose scales of one group a program finds


@triton.jit
def load_row(x_ptr, row_stride, width, BLOCK: tl.constexpr):
    """The program's row in float32, with its index, its columns, and which of these are channels."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    return values, row, column, inside


@triton.jit
def scaled_row(values, LEAST: tl.constexpr, MOST: tl.constexpr):
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), LEAST) / MOST
    return _clamped(values * (1.0 / scale), MOST), scale


@triton.jit
def _clamped(values, MOST: tl.constexpr):
    # Symmetric bounds take one instruction. NaN stays NaN, as in the reference.
    return tl.clamp(values, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_row(values, inside, out_ptr, scale_ptr, row, column, width, LEAST: tl.constexpr, MOST: tl.constexpr):
    scaled, scale = scaled_row(values, LEAST, MOST)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + column, scaled.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, row_stride, C, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr
):
    values, row, column, inside = load_row(x_ptr, row_stride, C, BLOCK)
    store_row(values, inside, out_ptr, scale_ptr, row, column, C, LEAST, MOST)


@triton.jit
def _swiglu_quantize_kernel(
    x_ptr, out_ptr, scale_ptr, row_stride, F, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr
):
    gate, row, column, inside = load_row(x_ptr, row_stride, F, BLOCK)
    up = tl.load(x_ptr + row * row_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    values = rounded_swiglu(gate, up, x_ptr.dtype.element_ty).to(tl.float32)
    store_row(values, inside, out_ptr, scale_ptr, row, column, F, LEAST, MOST)


@triton.jit
def _group_of_rows(R, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """The program's group, its rows [ROWS, 1], its columns [1, 128], and which of the rows there are.

    Programs of the same rows are neighbours, so that they read whole rows together; one program's scales are adjacent.
    """
    group = tl.program_id(0) % GROUPS
    row = (tl.program_id(0) // GROUPS * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    return group, row, group * 128 + tl.arange(0, 128)[None, :], row < R


@triton.jit
def _store_groups(
    values,
    out_ptr,
    scale_ptr,
    R,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    group, row, column, inside = _group_of_rows(R, GROUPS, ROWS)
    scale = tl.maximum(tl.max(tl.abs(values), axis=1, keep_dims=True), LEAST) / MOST
    scaled = _clamped(values * (1.0 / scale), MOST)
    tl.store(out_ptr + row * (GROUPS * 128) + column, scaled.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + group.to(tl.int64) * R + row, scale, mask=inside)


@triton.jit
def _quantize_groups_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    row_stride,
    R,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    _, row, column, inside = _group_of_rows(R, GROUPS, ROWS)
    values = tl.load(x_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    _store_groups(values, out_ptr, scale_ptr, R, LEAST, MOST, GROUPS, ROWS)


@triton.jit
def _swiglu_quantize_groups_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    scale_ptr,
    row_stride,
    R,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    _, row, column, inside = _group_of_rows(R, GROUPS, ROWS)
    source = row * row_stride + column
    gate = tl.load(gate_ptr + source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + source, mask=inside, other=0.0).to(tl.float32)
    values = rounded_swiglu(gate, up, gate_ptr.dtype.element_ty).to(tl.float32)
    _store_groups(values, out_ptr, scale_ptr, R, LEAST, MOST, GROUPS, ROWS)


def quantize_groups_kernel(x_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [R, C], contiguous, and float32 scales [C / 128, R]; channels of ``x`` are adjacent."""
    R, C = x_RC.shape
    out, scale = _group_outputs(x_RC, R, C)
    if R:
        _quantize_groups_kernel[_group_grid(R, C)](x_RC, out, scale, x_RC.stride(0), R, **_group_constants(C))
    return out, scale


def swiglu_quantize_groups_kernel(gate_RF: torch.Tensor, up_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [R, F] of ``silu(gate) * up`` and float32 scales [F / 128, R]; both inputs have equal strides."""
    R, F = gate_RF.shape
    assert gate_RF.stride(1) == 1, gate_RF.stride()
    assert gate_RF.stride() == up_RF.stride(), (gate_RF.stride(), up_RF.stride())
    out, scale = _group_outputs(gate_RF, R, F)
    if R:
        kernel = _swiglu_quantize_groups_kernel[_group_grid(R, F)]
        kernel(gate_RF, up_RF, out, scale, gate_RF.stride(0), R, **_group_constants(F))
    return out, scale


def quantize_rows_kernel(x_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [R, C], contiguous, and float32 scales [R]; channels of ``x`` are adjacent."""
    R, C = x_RC.shape
    out, scale = _outputs(x_RC, R, C)
    if R:
        _quantize_kernel[(R,)](x_RC, out, scale, x_RC.stride(0), C, **row_constants(C))
    return out, scale


def swiglu_quantize_kernel(gate_up_R2F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [R, F] of ``silu(gate) * up`` and float32 scales [R]."""
    R, F = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    assert gate_up_R2F.stride(1) == 1, gate_up_R2F.stride()
    out, scale = _outputs(gate_up_R2F, R, F)
    if R:
        _swiglu_quantize_kernel[(R,)](gate_up_R2F, out, scale, gate_up_R2F.stride(0), F, **row_constants(F))
    return out, scale


def quantized_outputs(
    x: torch.Tensor, rows: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float | int]]:
    """Values and scales to be written, and ``row_constants``."""
    return *_outputs(x, rows, width), row_constants(width)


def _outputs(x: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty(rows, dtype=torch.float32, device=x.device)


def row_constants(width: int) -> dict[str, float | int]:
    """Of a kernel that stores a row by ``store_row``."""
    from ..quantize import FLOAT8_MAX, LEAST_AMAX

    block = triton.next_power_of_2(width)
    return {"LEAST": LEAST_AMAX, "MOST": FLOAT8_MAX, "BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def _group_outputs(x: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty(width // 128, rows, dtype=torch.float32, device=x.device)


def _group_grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, _ROWS) * (width // 128),)


def _group_constants(width: int) -> dict[str, float | int]:
    from ..quantize import FLOAT8_MAX, LEAST_AMAX

    return {"LEAST": LEAST_AMAX, "MOST": FLOAT8_MAX, "GROUPS": width // 128, "ROWS": _ROWS, "num_warps": 4}
