"""RMSNorm in one pass over memory: alone or after a residual is added, plain or quantised. T rows, D channels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .quantize import load_row, row_constants, store_row


@triton.jit
def store_normed(
    x,
    weight_ptr,
    normed_ptr,
    scale_ptr,
    row,
    column,
    inside,
    D,
    eps,
    KIND: tl.constexpr,
    FLOAT8: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """The norm of a whole row ``x``, float32 numbers of type KIND, and its scale where it is stored in float8."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the weight, as the reference does.
    normed = (weight * (x * scale).to(KIND).to(tl.float32)).to(KIND)
    if FLOAT8:
        store_row(normed.to(tl.float32), inside, normed_ptr, scale_ptr, row, column, D, LEAST, MOST)
    else:
        tl.store(normed_ptr + row * D + column, normed, mask=inside)


# A chunk's scales may begin anywhere: one kernel for all of them, none compiled in the middle of a sweep.
@triton.jit(do_not_specialize_on_alignment=["scale_ptr"])
def _rms_norm_kernel(
    x_ptr,
    delta_ptr,
    total_ptr,
    weight_ptr,
    normed_ptr,
    scale_ptr,
    x_stride,
    delta_stride,
    total_stride,
    D,
    eps,
    ADD: tl.constexpr,
    FLOAT8: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, row, column, inside = load_row(x_ptr, x_stride, D, BLOCK)
    kind = x_ptr.dtype.element_ty
    if ADD:
        total = (x + tl.load(delta_ptr + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(total_ptr + row * total_stride + column, total, mask=inside)
        x = total.to(tl.float32)
    store_normed(x, weight_ptr, normed_ptr, scale_ptr, row, column, inside, D, eps, kind, FLOAT8, LEAST, MOST)


def rms_norm_kernel(
    x: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``weight * x / rms(x)`` over the last dimension; contiguous, of the shape of ``x``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    x_TD = x.reshape(-1, x.shape[-1])
    _launch(x_TD, None, x_TD, weight_D, eps, out.view(x_TD.shape), None)
    return out


def rms_norm_quantize_kernel(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out_TD: torch.Tensor, scale_T: torch.Tensor
) -> None:
    """Float8 values of the norm, rounded to the dtype of ``x`` first, to ``out``, and float32 scales."""
    _launch(x_TD, None, x_TD, weight_D, eps, out_TD, scale_T)


def add_rms_norm_kernel(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor,
    total_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    scale_T: torch.Tensor | None = None,
) -> None:
    """``x + delta`` to ``total``, which may be ``x``, and its norm to ``out``, which is float8 where there are
    scales.
    """
    assert x_TD.shape == delta_TD.shape == total_TD.shape, (x_TD.shape, delta_TD.shape, total_TD.shape)
    _launch(x_TD, delta_TD, total_TD, weight_D, eps, out_TD, scale_T)


def norm_arguments(weight_D: torch.Tensor, out_TD: torch.Tensor, scale_T: torch.Tensor | None) -> dict[str, Any]:
    """What a kernel gets that ends with ``store_normed``. As many warps whatever comes before the norm: they sum its
    squares in one order.
    """
    D, float8 = out_TD.shape[1], scale_T is not None
    assert weight_D.shape == (D,), (weight_D.shape, out_TD.shape)
    assert out_TD.is_contiguous(), out_TD.stride()
    assert scale_T is None or (scale_T.is_contiguous() and len(scale_T) == len(out_TD)), out_TD.shape
    constants = row_constants(D)
    if not float8:
        constants["num_warps"] = 4 if D <= 2048 else 8
    return {
        "weight_ptr": weight_D,
        "normed_ptr": out_TD,
        "scale_ptr": out_TD if scale_T is None else scale_T,
        "D": D,
        "FLOAT8": float8,
        **constants,
    }


def _launch(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    total_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    scale_T: torch.Tensor | None,
) -> None:
    delta = x_TD if delta_TD is None else delta_TD
    assert x_TD.shape == out_TD.shape, (x_TD.shape, out_TD.shape)
    if not len(x_TD):
        return
    assert x_TD.stride(1) == delta.stride(1) == total_TD.stride(1) == 1, (x_TD.stride(), delta.stride())
    _rms_norm_kernel[(len(x_TD),)](
        x_TD,
        delta,
        total_TD,
        x_stride=x_TD.stride(0),
        delta_stride=delta.stride(0),
        total_stride=total_TD.stride(0),
        eps=eps,
        ADD=delta_TD is not None,
        **norm_arguments(weight_D, out_TD, scale_T),
    )
