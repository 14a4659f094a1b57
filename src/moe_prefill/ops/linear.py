"""A linear map whose weight is plain or float8. R rows, N output and C input channels.

A float8 weight has a float32 scale a row. Its input is quantised the same way, row by row, and the product is scaled
by both. Checkpoints that are published with block scales keep them where a kernel takes them (``block_linear``); else
they are re-made with a scale a row when they are loaded. Weights that are quantised while loading get a scale a row: at
these shapes that product is the faster one (8192^3 on an H200: 1420 against 1196 TFLOP/s with 128 x 128 blocks).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .block_linear import Float8Blocks, block_linear
from .grouped import has_float8
from .rms_norm import add_rms_norm_, rms_norm, rms_norm_quantize
from .rows import Float8Rows, Rows

Matrix = torch.Tensor | Float8Rows | Float8Blocks  # of weights


def ref_linear(
    x_RC: Float8Rows, weight_NC: Float8Rows, bias_N: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The product of what the values stand for, summed in float32 and rounded once, before the bias; [R, N]."""
    out = (x_RC.values.float() @ weight_NC.values.float().t()) * x_RC.scale[:, None] * weight_NC.scale
    return out.to(dtype) if bias_N is None else out.to(dtype) + bias_N


def linear(
    x_RC: Rows, weight_NC: Matrix, bias_N: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias``; [R, N] in the dtype of ``x`` (bfloat16 where it comes quantised), new or in ``out``.

    A plain ``x`` is quantised where the weight is float8 and the device multiplies float8 (``has_float8``). Elsewhere
    the weight is widened, a copy of the one matrix for each call: it saves memory there, not time.
    """
    if isinstance(weight_NC, torch.Tensor):
        assert isinstance(x_RC, torch.Tensor), "a plain weight takes plain rows"
        if out is None:
            return F.linear(x_RC, weight_NC, bias_N)
        if bias_N is None:
            return torch.mm(x_RC, weight_NC.t(), out=out)
        return torch.addmm(bias_N, x_RC, weight_NC.t(), out=out)
    if isinstance(weight_NC, Float8Blocks):
        assert isinstance(x_RC, torch.Tensor), "a weight of blocks takes plain rows"
        return block_linear(x_RC, weight_NC, bias_N, out)
    return _float8_linear(x_RC, weight_NC, bias_N, out)


def rms_norm_for(x_RC: torch.Tensor, norm_C: torch.Tensor, eps: float, weight_NC: Matrix) -> Rows:
    """The norm of rows as ``linear`` of this weight takes it: quantised in the same pass where the product is in
    float8 with a scale a row.
    """
    if isinstance(weight_NC, Float8Rows) and x_RC.dtype == torch.bfloat16 and has_float8(x_RC.device):
        return rms_norm_quantize(x_RC, norm_C, eps)
    return rms_norm(x_RC, norm_C, eps)


def linear_add_rms_norm_(
    x_RC: torch.Tensor,
    weight_NC: Matrix,
    bias_N: torch.Tensor | None,
    residual_RN: torch.Tensor,
    norm_N: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """``residual += linear(x, weight, bias)`` in place, then its norm; a new tensor [R, N].

    On a GPU the product adds a plain weight's result to the residual itself: one pass less, and one rounding less.
    """
    if residual_RN.is_cuda and isinstance(weight_NC, torch.Tensor) and bias_N is None:
        return rms_norm(residual_RN.addmm_(x_RC, weight_NC.t()), norm_N, eps)
    return add_rms_norm_(residual_RN, linear(x_RC, weight_NC, bias_N), norm_N, eps)


def _float8_linear(
    x_RC: Rows, weight_NC: Float8Rows, bias_N: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    dtype = x_RC.dtype if isinstance(x_RC, torch.Tensor) else torch.bfloat16
    if isinstance(x_RC, torch.Tensor) and not has_float8(x_RC.device):
        return linear(x_RC, weight_NC.wide(dtype), bias_N, out)
    rows = Float8Rows.of(x_RC) if isinstance(x_RC, torch.Tensor) else x_RC
    if rows.values.is_cuda and linear_fits(weight_NC.shape) and dtype == torch.bfloat16:
        product = _scaled_mm(rows, weight_NC, out)
        return product if bias_N is None else product.add_(bias_N)
    product = ref_linear(rows, weight_NC, bias_N, dtype)
    return product if out is None else out.copy_(product)


def linear_fits(shape_NC: tuple[int, ...]) -> bool:
    """Whether torch's row-wise product takes a weight of this shape: both sizes a multiple of 16."""
    return all(size % 16 == 0 for size in shape_NC)


def _scaled_mm(x_RC: Float8Rows, weight_NC: Float8Rows, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        out = x_RC.scale.new_empty(len(x_RC), len(weight_NC), dtype=torch.bfloat16)
    if not len(x_RC):
        return out
    return torch._scaled_mm(
        x_RC.values,
        weight_NC.values.t(),
        scale_a=_aligned(x_RC.scale)[:, None],
        scale_b=_aligned(weight_NC.scale)[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        out=out,
    )


def _aligned(scale_R: torch.Tensor) -> torch.Tensor:
    """cuBLAS refuses scales that do not begin at 16 bytes, as those of a slice of rows may not
    (https://github.com/pytorch/pytorch/pull/159957): they are copied, 4 bytes a row.
    """
    return scale_R if scale_R.data_ptr() % 16 == 0 else scale_R.clone()
