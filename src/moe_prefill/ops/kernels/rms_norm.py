"""RMSNorm, one pass over memory. T rows, D channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    # Rounded before the weight, as the reference does.
    normed = (x * scale).to(kind).to(tl.float32)
    tl.store(out_ptr + row * D + column, (weight * normed).to(kind), mask=inside)


def rms_norm_kernel(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / rms(x)`` over the last dimension; a contiguous tensor of the shape of ``x``."""
    D = x.shape[-1]
    flat = x.reshape(-1, D)
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if len(flat):
        block = triton.next_power_of_2(D)
        warps = 4 if block <= 2048 else 8
        _rms_norm_kernel[(len(flat),)](flat, weight_D, out, flat.stride(0), D, eps, BLOCK=block, num_warps=warps)
    return out.view(x.shape)
