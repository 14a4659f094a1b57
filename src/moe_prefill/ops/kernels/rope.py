"""Head norm and rotation in one pass. T tokens, H heads, d channels (all rotated)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _head_norm_rope_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_token_stride,
    x_head_stride,
    out_token_stride,
    out_head_stride,
    rows,
    eps,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    # A row is one head of one token, so that few heads fill a program as well as many.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = (row // H).to(tl.int64), row % H
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (row < rows) & (column < HALF)
    source = x_ptr + token * x_token_stride + head * x_head_stride + column
    kind = out_ptr.dtype.element_ty
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        weight_1 = tl.load(weight_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)
        weight_2 = tl.load(weight_ptr + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
        # Rounded where the reference rounds: before and after the weight.
        a = (weight_1 * (a * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        b = (weight_2 * (b * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + column, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + column, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + token * out_token_stride + head * out_head_stride + column
    tl.store(target, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(target + HALF, (b * cos + a * sin).to(kind), mask=inside)


def head_norm_rope_kernel(
    x_THd: torch.Tensor,
    weight_d: torch.Tensor | None,
    cos_Tr: torch.Tensor,
    sin_Tr: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm of each head where a weight is given, then rotate pairs (i, i + d / 2); contiguous [T, H, d], or ``out``,
    which may be ``x`` itself.
    """
    T, H, d = x_THd.shape
    out = torch.empty(T, H, d, dtype=x_THd.dtype, device=x_THd.device) if out is None else out
    assert out.shape == x_THd.shape, (out.shape, x_THd.shape)
    assert x_THd.stride(2) == out.stride(2) == 1 or not T, (x_THd.stride(), out.stride())
    assert cos_Tr.is_contiguous(), cos_Tr.stride()
    assert sin_Tr.is_contiguous(), sin_Tr.stride()
    if T:
        half_block = triton.next_power_of_2(d // 2)
        rows = max(1, 2048 // half_block)
        _head_norm_rope_kernel[(triton.cdiv(T * H, rows),)](
            x_THd,
            cos_Tr if weight_d is None else weight_d,
            cos_Tr,
            sin_Tr,
            out,
            x_THd.stride(0),
            x_THd.stride(1),
            out.stride(0),
            out.stride(1),
            T * H,
            eps,
            H=H,
            HALF=d // 2,
            HALF_BLOCK=half_block,
            ROWS=rows,
            NORM=weight_d is not None,
            num_warps=4,
        )
    return out
