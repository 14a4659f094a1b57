"""Float8 (e4m3) with float32 scales. R rows, N output and C input channels, G groups of 128 channels.

Activations have one scale a row, or one for each 128 channels of a row: a scale never spans rows, so that a token's
numbers do not depend on its neighbours in a batch. Weights have one scale a row, or one for each block of 128 x 128, as
published checkpoints do (``weight_scale_inv``; it multiplies, whatever its name says).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import use_triton
from .swiglu import swiglu

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
LEAST_AMAX = 1e-12  # a row of zeros gets a scale all the same
BLOCK = 128  # channels that share a scale, in rows of activations and on both sides of a block of weights


def ref_quantize_rows(x_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values float8 [..., C] and scales float32 [...], so that ``values * scale`` is close to ``x``: the largest
    magnitude of a row becomes 448. A row [0, 1, -2] has scale 2 / 448 and values [0, 224, -448].

    Values are ``x`` times the reciprocal of the scale, one division a row. In float32 that is within 2^-22 of the
    quotient, relative to it: where the quotient lies so near to the middle between two float8 numbers, it may become
    either. The largest magnitude is 448 all the same.
    """
    wide = x_RC.float()
    scale = wide.abs().amax(-1).clamp_(min=LEAST_AMAX) / FLOAT8_MAX
    return (wide * scale.reciprocal().unsqueeze(-1)).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


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


def ref_quantize_groups(x_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values float8 [R, C] and scales float32 [G, R] with a scale for each ``BLOCK`` channels of a row, groups first:
    that is how block-scaled products read them. C is a multiple of ``BLOCK``.
    """
    groups_RGB = torch.unflatten(x_RC.float(), 1, (-1, BLOCK))
    values, scale_RG = ref_quantize_rows(groups_RGB)
    return values.flatten(1), scale_RG.t().contiguous()


def quantize_groups(x_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [R, C] and float32 scales [G, R]; see ``ref_quantize_groups``."""
    assert x_RC.shape[1] % BLOCK == 0, x_RC.shape
    if use_triton(x_RC) and x_RC.stride(1) == 1:
        from .kernels.quantize import quantize_groups_kernel

        return quantize_groups_kernel(x_RC)
    return ref_quantize_groups(x_RC)


def swiglu_quantize_groups(gate_RF: torch.Tensor, up_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``silu(gate) * up``, rounded to their dtype, then ``quantize_groups``: float8 [R, F] and float32 [F / 128, R]."""
    assert gate_RF.shape == up_RF.shape, (gate_RF.shape, up_RF.shape)
    if use_triton(gate_RF) and gate_RF.stride() == up_RF.stride():
        from .kernels.quantize import swiglu_quantize_groups_kernel

        return swiglu_quantize_groups_kernel(gate_RF, up_RF)
    return ref_quantize_groups(F.silu(gate_RF) * up_RF)


def quantize_blocks(weight_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values [..., N, C] and float32 scales [..., ceil(N / 128), ceil(C / 128)]; blocks at the lower and right
    edges may be smaller.
    """
    N, C = weight_NC.shape[-2:]
    wide = F.pad(weight_NC.float(), (0, -C % BLOCK, 0, -N % BLOCK))
    blocks = torch.unflatten(torch.unflatten(wide, -1, (-1, BLOCK)), -3, (-1, BLOCK))  # [..., n, 128, c, 128]
    scale = blocks.abs().amax((-3, -1)).clamp_(min=LEAST_AMAX) / FLOAT8_MAX
    scaled = (blocks / scale.unsqueeze(-2).unsqueeze(-1)).clamp_(-FLOAT8_MAX, FLOAT8_MAX)
    return scaled.flatten(-2).flatten(-3, -2)[..., :N, :C].to(FLOAT8), scale


def dequantize_blocks(values_NC: torch.Tensor, scale: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """Float32 [..., N, C]: each value times the scale of its block, exactly. A matrix may consist of ``parts`` of equal
    height, one below the other, each with a grid of its own.
    """
    N, C = values_NC.shape[-2:]
    grids = torch.unflatten(scale.float(), -2, (parts, -1))
    rows = grids.repeat_interleave(BLOCK, dim=-2)[..., : N // parts, :].flatten(-3, -2)
    return values_NC.float().mul_(rows.repeat_interleave(BLOCK, dim=-1)[..., :C])
