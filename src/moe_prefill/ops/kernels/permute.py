"""Copy each token's row to its K places among the experts' rows, as it is or quantised. T tokens, D channels, K top-k,
R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .quantize import load_row, quantized_outputs, scaled_row


@triton.jit
def _permute_kernel(x_ptr, row_of_slot_ptr, out_ptr, x_stride, D, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + token * x_stride + column, mask=inside)
    for k in tl.static_range(K):
        row = tl.load(row_of_slot_ptr + token * K + k).to(tl.int64)
        # Not ``inside & (row >= 0)``: Triton 3.9's interpreter widens that scalar to int32 and refuses the mask.
        tl.store(out_ptr + row * D + column, x, mask=tl.where(row >= 0, inside, False))


@triton.jit
def _permute_quantize_kernel(
    x_ptr,
    row_of_slot_ptr,
    out_ptr,
    scale_ptr,
    x_stride,
    D,
    K: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    values, token, column, inside = load_row(x_ptr, x_stride, D, BLOCK)
    scaled, scale = scaled_row(values, LEAST, MOST)
    scaled = scaled.to(out_ptr.dtype.element_ty)
    for k in tl.static_range(K):
        row = tl.load(row_of_slot_ptr + token * K + k).to(tl.int64)
        tl.store(out_ptr + row * D + column, scaled, mask=tl.where(row >= 0, inside, False))
        tl.store(scale_ptr + row, scale, mask=row >= 0)


def permute_kernel(x_TD: torch.Tensor, row_of_slot_TK: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``out[row_of_slot[t, k]] = x[t]``, nothing where that row is negative; [R, D] of any dtype."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == 1 or not T, x_TD.stride()
    out = torch.empty(num_rows, D, dtype=x_TD.dtype, device=x_TD.device)
    if num_rows:
        source, target = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (x_TD, out))
        block = min(4096, triton.next_power_of_2(D))
        _permute_kernel[(T, triton.cdiv(D, block))](
            source,
            row_of_slot_TK.contiguous(),
            target,
            x_TD.stride(0),
            D,
            K=row_of_slot_TK.shape[1],
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )
    return out


def permute_quantize_kernel(
    x_TD: torch.Tensor, row_of_slot_TK: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [R, D] and float32 scales [R] of ``permute_kernel``'s rows."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == 1 or not T, x_TD.stride()
    values, scale, constants = quantized_outputs(x_TD, num_rows, D)
    if num_rows:
        slots = row_of_slot_TK.contiguous()
        _permute_quantize_kernel[(T,)](x_TD, slots, values, scale, x_TD.stride(0), D, K=slots.shape[1], **constants)
    return values, scale
