"""The gated activation of a feed-forward. R rows, F channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import use_triton


def ref_swiglu(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` where a row holds F gate channels, then F up channels; [R, F]."""
    gate, up = gate_up_R2F.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; a new tensor [R, F] in the dtype of the input."""
    assert gate_up_R2F.shape[-1] % 2 == 0, gate_up_R2F.shape
    if use_triton(gate_up_R2F):
        from .kernels.swiglu import swiglu_kernel

        return swiglu_kernel(gate_up_R2F)
    gate, up = gate_up_R2F.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
