"""Float8 (e4m3) with one float32 scale a row. R rows, C channels.

A scale never spans rows, so that a token's numbers do not depend on its neighbours in a batch.
"""

from __future__ import annotations

import torch

from .backend import use_triton
from .swiglu import swiglu

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
LEAST_AMAX = 1e-12  # a row of zeros gets a scale all the same


def ref_quantize_rows(x_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values float8 [..., C] and scales float32 [...], so that ``values * scale`` is close to ``x``: the largest
    magnitude of a row becomes 448. A row [0, 1, -2] has scale 2 / 448 and values [0, 224, -448].
    """
    wide = x_RC.float()
    scale = wide.abs().amax(-1).clamp_(min=LEAST_AMAX) / FLOAT8_MAX
    return (wide / scale.unsqueeze(-1)).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


def quantize_rows(x_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [R, C] and float32 scales [R] of rows; see ``ref_quantize_rows``."""
    if use_triton(x_RC) and x_RC.ndim == 2 and x_RC.stride(1) == 1:
        from .kernels.quantize import quantize_rows_kernel

        return quantize_rows_kernel(x_RC)
    return ref_quantize_rows(x_RC)


def swiglu_quantize(gate_up_R2F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``swiglu``, rounded to the dtype of its input, then ``quantize_rows``: float8 [R, F] and float32 [R]."""
    if use_triton(gate_up_R2F):
        from .kernels.quantize import swiglu_quantize_kernel

        return swiglu_quantize_kernel(gate_up_R2F)
    return ref_quantize_rows(swiglu(gate_up_R2F))


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values * scale`` row by row, rounded once."""
    return (values.float() * scale.unsqueeze(-1)).to(dtype)
