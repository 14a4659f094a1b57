"""RMSNorm. T rows, D channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backend import use_triton
from .quantize import ref_quantize_rows
from .rows import Float8Rows, Rows
from .script import scripted


@dataclass(frozen=True, slots=True, eq=False)
class NormInto:
    """A norm of rows that an operation writes, taken in the same pass: with ``weight`` [D], of the rounded rows, into
    ``out`` [T, D], which is quantised where it is float8.
    """

    weight: torch.Tensor
    eps: float
    out: Rows

    def __getitem__(self, rows: slice) -> NormInto:
        return NormInto(self.weight, self.eps, self.out[rows])

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is written: rows, and their scales where they are float8."""
        return (self.out.values, self.out.scale) if isinstance(self.out, Float8Rows) else (self.out, None)

    def take(self, x_TD: torch.Tensor) -> None:
        """The norm of rows that are written already."""
        if isinstance(self.out, Float8Rows):
            rms_norm_quantize(x_TD, self.weight, self.eps, self.out)
        else:
            rms_norm(x_TD, self.weight, self.eps, self.out)


def ref_rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``: the mean in float32, the result in the dtype of ``x``."""
    wide = x_TD.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * scaled.to(x_TD.dtype)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm over the last dimension, in the shape and dtype of ``x_TD``; new, or in ``out``, which is contiguous."""
    assert x_TD.shape[-1] == weight_D.shape[0], (x_TD.shape, weight_D.shape)
    assert out is None or (out.shape == x_TD.shape and out.dtype == x_TD.dtype), (out.shape, out.dtype, x_TD.shape)
    if use_triton(x_TD):
        from .kernels.rms_norm import rms_norm_kernel

        return rms_norm_kernel(x_TD, weight_D, eps, out)
    return (few_passes_rms_norm if x_TD.is_cuda else _cpu_rms_norm)(x_TD, weight_D, eps, out)


def rms_norm_quantize(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: Float8Rows | None = None
) -> Float8Rows:
    """``rms_norm``, rounded to the dtype of ``x``, then ``quantize_rows``; new [T, D], or in ``out``."""
    assert x_TD.shape[-1] == weight_D.shape[0], (x_TD.shape, weight_D.shape)
    out = Float8Rows.empty(len(x_TD), x_TD.shape[1], x_TD.device) if out is None else out
    assert out.shape == x_TD.shape, (out.shape, x_TD.shape)
    if use_triton(x_TD):
        from .kernels.rms_norm import rms_norm_quantize_kernel

        rms_norm_quantize_kernel(x_TD, weight_D, eps, out.values, out.scale)
        return out
    values, scale = ref_quantize_rows(few_passes_rms_norm(x_TD, weight_D, eps))
    out.values.copy_(values)
    out.scale.copy_(scale)
    return out


def ref_add_rms_norm_(x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``x += delta`` in place, rounded to its dtype, then the norm of that; a new tensor [T, D]."""
    return ref_rms_norm(x_TD.add_(delta_TD), weight_D, eps)


def add_rms_norm_(x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``ref_add_rms_norm_`` in one pass over both: a residual that is added and normed."""
    normed = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    add_rms_norm(x_TD, delta_TD, x_TD, NormInto(weight_D, eps, normed))
    return normed


def add_rms_norm(x_TD: torch.Tensor, delta_TD: torch.Tensor, out_TD: torch.Tensor, norm: NormInto | None) -> None:
    """``x + delta`` to ``out``, which may be ``x``; and where a norm of that is wanted, it too, in one pass."""
    assert x_TD.shape == delta_TD.shape == out_TD.shape, (x_TD.shape, delta_TD.shape, out_TD.shape)
    if norm is not None and use_triton(x_TD):
        from .kernels.rms_norm import add_rms_norm_kernel

        add_rms_norm_kernel(x_TD, delta_TD, out_TD, norm.weight, norm.eps, *norm.tensors)
        return
    torch.add(x_TD, delta_TD, out=out_TD)
    if norm is not None:
        norm.take(out_TD)


def few_passes_rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference with few passes over memory; torch would convert operands of mixed types once more each."""
    wide = x_TD.float()
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.rsqrt(norms.square_() / x_TD.shape[-1] + eps)
    if wide is x_TD:
        scaled = torch.mul(x_TD, scale) if out is None else torch.mul(x_TD, scale, out=out)
    else:
        wide.mul_(scale)
        scaled = wide.to(x_TD.dtype) if out is None else out.copy_(wide)
    return scaled.mul_(weight_D)


_cpu_rms_norm = scripted(few_passes_rms_norm)
