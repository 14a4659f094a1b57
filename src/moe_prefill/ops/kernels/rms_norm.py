"""RMSNorm in one pass over memory: alone, after a residual is added, or with its result quantised. T rows, D
channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .quantize import load_row, quantized_outputs, store_row


@triton.jit
def _normed(x, weight_ptr, column, inside, D, eps, KIND: tl.constexpr):
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the weight, as the reference does.
    return (weight * (x * scale).to(KIND).to(tl.float32)).to(KIND)


@triton.jit
def _rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, out_ptr, x_stride, delta_stride, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    x, row, column, inside = load_row(x_ptr, x_stride, D, BLOCK)
    kind = out_ptr.dtype.element_ty
    if ADD:
        x = (x + tl.load(delta_ptr + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)).to(kind)
        x = x.to(tl.float32)
    tl.store(out_ptr + row * D + column, _normed(x, weight_ptr, column, inside, D, eps, kind), mask=inside)
    if ADD:
        tl.store(x_ptr + row * x_stride + column, x.to(kind), mask=inside)


@triton.jit
def _rms_norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    x_stride,
    D,
    eps,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, row, column, inside = load_row(x_ptr, x_stride, D, BLOCK)
    normed = _normed(x, weight_ptr, column, inside, D, eps, x_ptr.dtype.element_ty).to(tl.float32)
    store_row(normed, inside, out_ptr, scale_ptr, row, column, D, LEAST, MOST)


def rms_norm_kernel(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / rms(x)`` over the last dimension; a contiguous tensor of the shape of ``x``."""
    return _launch(x.reshape(-1, x.shape[-1]), None, weight_D, eps).view(x.shape)


def add_rms_norm_kernel_(
    x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """``x += delta`` in place, then its norm; a contiguous tensor [T, D]."""
    assert x_TD.stride(1) == delta_TD.stride(1) == 1, (x_TD.stride(), delta_TD.stride())
    return _launch(x_TD, delta_TD, weight_D, eps)


def rms_norm_quantize_kernel(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [T, D] of the norm, rounded to the dtype of ``x`` first, and float32 scales [T]."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == 1 or not T, x_TD.stride()
    values, scale, constants = quantized_outputs(x_TD, T, D)
    if T:
        _rms_norm_quantize_kernel[(T,)](x_TD, weight_D, values, scale, x_TD.stride(0), D, eps, **constants)
    return values, scale


def _launch(x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    T, D = x_TD.shape
    out = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    if T:
        block = triton.next_power_of_2(D)
        delta = x_TD if delta_TD is None else delta_TD
        _rms_norm_kernel[(T,)](
            x_TD,
            delta,
            weight_D,
            out,
            x_TD.stride(0),
            delta.stride(0),
            D,
            eps,
            ADD=delta_TD is not None,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )
    return out
