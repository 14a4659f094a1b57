"""Gather each token's expert rows, weigh them, add the residual; alone, or with the norm of that. T tokens, D
channels, K top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rms_norm import norm_arguments, store_normed


@triton.jit
def _combined(
    rows_ptr,
    slot_ptr,
    weight_ptr,
    residual_ptr,
    residual_stride,
    token,
    column,
    inside,
    D,
    KIND: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns of a token's sum, rounded to KIND."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot_ptr + token * K + k).to(tl.int64)
        weight = tl.load(weight_ptr + token * K + k).to(tl.float32)
        value = tl.load(rows_ptr + row * D + column, mask=tl.where(row >= 0, inside, False), other=0.0).to(tl.float32)
        total += tl.where(row >= 0, weight * value, 0.0)
    residual = tl.load(residual_ptr + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    return (residual + total.to(KIND).to(tl.float32)).to(KIND)


@triton.jit
def _combine_kernel(
    rows_ptr,
    slot_ptr,
    route_ptr,
    residual_ptr,
    out_ptr,
    residual_stride,
    out_stride,
    D,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    kind = out_ptr.dtype.element_ty
    x = _combined(
        rows_ptr, slot_ptr, route_ptr, residual_ptr, residual_stride, token, column, inside, D, kind, K, BLOCK
    )
    tl.store(out_ptr + token * out_stride + column, x, mask=inside)


# A chunk's scales may begin anywhere: one kernel for all of them, none compiled in the middle of a sweep.
@triton.jit(do_not_specialize_on_alignment=["scale_ptr"])
def _combine_rms_norm_kernel(
    rows_ptr,
    slot_ptr,
    route_ptr,
    residual_ptr,
    out_ptr,
    weight_ptr,
    normed_ptr,
    scale_ptr,
    residual_stride,
    out_stride,
    D,
    eps,
    K: tl.constexpr,
    FLOAT8: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    kind = out_ptr.dtype.element_ty
    x = _combined(
        rows_ptr, slot_ptr, route_ptr, residual_ptr, residual_stride, token, column, inside, D, kind, K, BLOCK
    )
    tl.store(out_ptr + token * out_stride + column, x, mask=inside)
    store_normed(
        x.to(tl.float32), weight_ptr, normed_ptr, scale_ptr, token, column, inside, D, eps, kind, FLOAT8, LEAST, MOST
    )


def combine_kernel(
    rows_RD: torch.Tensor,
    row_of_slot_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    residual_TD: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + sum_k weights[t, k] rows[row_of_slot[t, k]]``, summed in float32 in order of k; [T, D]. ``out`` may
    be the residual itself.
    """
    T, D = residual_TD.shape
    out = _checked_out(rows_RD, residual_TD, out)
    if T:
        block = min(2048, triton.next_power_of_2(D))
        _combine_kernel[(T, triton.cdiv(D, block))](
            rows_RD,
            row_of_slot_TK.contiguous(),
            weights_TK.contiguous(),
            residual_TD,
            out,
            residual_TD.stride(0),
            out.stride(0),
            D,
            K=weights_TK.shape[1],
            BLOCK=block,
            num_warps=4,
        )
    return out


def combine_rms_norm_kernel(
    rows_RD: torch.Tensor,
    row_of_slot_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    residual_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    normed_TD: torch.Tensor,
    scale_T: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``combine_kernel``, and the norm of what it writes to ``normed``, which is float8 where there are scales."""
    out = _checked_out(rows_RD, residual_TD, out)
    assert normed_TD.shape == out.shape, (normed_TD.shape, out.shape)
    if len(out):
        _combine_rms_norm_kernel[(len(out),)](
            rows_RD,
            row_of_slot_TK.contiguous(),
            weights_TK.contiguous(),
            residual_TD,
            out,
            residual_stride=residual_TD.stride(0),
            out_stride=out.stride(0),
            eps=eps,
            K=weights_TK.shape[1],
            **norm_arguments(norm_D, normed_TD, scale_T),
        )
    return out


def _checked_out(rows_RD: torch.Tensor, residual_TD: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    assert rows_RD.is_contiguous(), rows_RD.stride()
    assert residual_TD.stride(1) == 1, residual_TD.stride()
    out = torch.empty_like(residual_TD) if out is None else out
    assert out.shape == residual_TD.shape, (out.shape, residual_TD.shape)
    assert out.stride(1) == 1, out.stride()
    return out
