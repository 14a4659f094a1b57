"""The gated activation in one pass. R rows, F channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, row_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(x_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * row_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    # silu is rounded before the product, as the reference does.
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out_ptr + row * F + column, (silu * up).to(kind), mask=inside)


def swiglu_kernel(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of rows that hold gate, then up; contiguous [R, F]."""
    R, F = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    assert gate_up_R2F.stride(1) == 1, gate_up_R2F.stride()
    out = torch.empty(R, F, dtype=gate_up_R2F.dtype, device=gate_up_R2F.device)
    if R:
        block = min(1024, triton.next_power_of_2(F))
        _swiglu_kernel[(R, triton.cdiv(F, block))](gate_up_R2F, out, gate_up_R2F.stride(0), F, BLOCK=block, num_warps=4)
    return out
