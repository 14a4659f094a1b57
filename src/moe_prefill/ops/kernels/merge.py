"""Two partial attentions into one, in one pass. T rows, H heads, d channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _merge_kernel(
    out_ptr,
    lse_ptr,
    other_ptr,
    other_lse_ptr,
    out_row_stride,
    out_head_stride,
    lse_row_stride,
    lse_head_stride,
    other_row_stride,
    other_head_stride,
    other_lse_row_stride,
    other_lse_head_stride,
    rows,
    D,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program's rows are pairs of a row and a head.
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, head = (pair // H).to(tl.int64), pair % H
    valid = pair < rows
    lse_at = lse_ptr + row * lse_row_stride + head * lse_head_stride
    first = tl.load(lse_at, mask=valid, other=0.0)
    second = tl.load(other_lse_ptr + row * other_lse_row_stride + head * other_lse_head_stride, mask=valid, other=0.0)
    most = tl.maximum(first, second)
    base = tl.where(most == -float("inf"), 0.0, most)
    first, second = tl.exp(first - base), tl.exp(second - base)
    total = first + second
    some = tl.where(total == 0.0, 1.0, total)  # no keys on either side: both are zero
    tl.debug_barrier()  # several warps read a log-sum-exp, one writes it
    tl.store(lse_at, base + tl.log(total), mask=valid)
    column = tl.arange(0, BLOCK)[None, :]
    inside = valid[:, None] & (column < D)
    out_at = out_ptr + row[:, None] * out_row_stride + head[:, None] * out_head_stride + column
    other_at = other_ptr + row[:, None] * other_row_stride + head[:, None] * other_head_stride + column
    out = tl.load(out_at, mask=inside, other=0.0).to(tl.float32) * (first / some)[:, None]
    out += tl.load(other_at, mask=inside, other=0.0).to(tl.float32) * (second / some)[:, None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


def merge_kernel_(
    out_THd: torch.Tensor, lse_TH: torch.Tensor, other_THd: torch.Tensor, other_lse_TH: torch.Tensor
) -> None:
    """See ``ref_merge_``. Channels are adjacent, everything else may have any strides."""
    T, H, d = out_THd.shape
    if not T:
        return
    assert out_THd.stride(2) == other_THd.stride(2) == 1, (out_THd.stride(), other_THd.stride())
    block = triton.next_power_of_2(d)
    rows = max(1, 4096 // block)
    _merge_kernel[(triton.cdiv(T * H, rows),)](
        out_THd,
        lse_TH,
        other_THd,
        other_lse_TH,
        *out_THd.stride()[:2],
        *lse_TH.stride(),
        *other_THd.stride()[:2],
        *other_lse_TH.stride(),
        T * H,
        d,
        H=H,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
