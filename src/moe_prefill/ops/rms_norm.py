"""RMSNorm. T rows, D channels."""

from __future__ import annotations

import torch

from .backend import use_triton
from .quantize import ref_quantize_rows
from .script import scripted


def ref_rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``: the mean in float32, the result in the dtype of ``x``."""
    wide = x_TD.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * scaled.to(x_TD.dtype)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension; a new tensor of the shape and dtype of ``x_TD``."""
    assert x_TD.shape[-1] == weight_D.shape[0], (x_TD.shape, weight_D.shape)
    if use_triton(x_TD):
        from .kernels.rms_norm import rms_norm_kernel

        return rms_norm_kernel(x_TD, weight_D, eps)
    return few_passes_rms_norm(x_TD, weight_D, eps) if x_TD.is_cuda else _cpu_rms_norm(x_TD, weight_D, eps)


def rms_norm_quantize(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm``, rounded to the dtype of ``x``, then ``quantize_rows``: float8 [T, D] and float32 [T]."""
    assert x_TD.shape[-1] == weight_D.shape[0], (x_TD.shape, weight_D.shape)
    if use_triton(x_TD):
        from .kernels.rms_norm import rms_norm_quantize_kernel

        return rms_norm_quantize_kernel(x_TD, weight_D, eps)
    return ref_quantize_rows(few_passes_rms_norm(x_TD, weight_D, eps))


def ref_add_rms_norm_(x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``x += delta`` in place, rounded to its dtype, then the norm of that; a new tensor [T, D]."""
    return ref_rms_norm(x_TD.add_(delta_TD), weight_D, eps)


def add_rms_norm_(x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``ref_add_rms_norm_`` in one pass over both: a residual that is added and normed."""
    assert x_TD.shape == delta_TD.shape, (x_TD.shape, delta_TD.shape)
    assert x_TD.shape[-1] == weight_D.shape[0], (x_TD.shape, weight_D.shape)
    if use_triton(x_TD):
        from .kernels.rms_norm import add_rms_norm_kernel_

        return add_rms_norm_kernel_(x_TD, delta_TD, weight_D, eps)
    return rms_norm(x_TD.add_(delta_TD), weight_D, eps)


def few_passes_rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The reference with few passes over memory; torch would convert operands of mixed types once more each."""
    wide = x_TD.float()
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.rsqrt(norms.square_() / x_TD.shape[-1] + eps)
    if wide is x_TD:
        return torch.mul(x_TD, scale).mul_(weight_D)
    return wide.mul_(scale).to(x_TD.dtype).mul_(weight_D)


_cpu_rms_norm = scripted(few_passes_rms_norm)
