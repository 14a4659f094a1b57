"""The routed experts of one layer on local tokens. T tokens, D channels, E experts, I expert channels, K top-k, R = T
K rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import use_triton
from .block_experts import aligned_rows, block_experts_rows
from .expert_rows import expert_rows
from .grouped import has_float8, scaled_grouped_mm
from .permute import order_by_expert, permute, permute_quantize
from .quantize import swiglu_quantize
from .rms_norm import NormInto, ref_rms_norm
from .swiglu import ref_swiglu, swiglu


def ref_experts(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
) -> torch.Tensor:
    """Sum over a token's K experts of ``weight * down(swiglu(gate_up(x)))``, summed in float32; [T, D]."""
    out = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in range(gate_up_E2ID.shape[0]):
        token, slot = torch.where(ids_TK == expert)
        hidden = ref_swiglu(F.linear(x_TD[token], gate_up_E2ID[expert]))
        rows = F.linear(hidden, down_EDI[expert]).float() * weights_TK[token, slot, None].float()
        out.index_add_(0, token, rows)
    return out.to(x_TD.dtype)


def experts(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
    residual_TD: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    num_rows: int | None = None,
    x_scale_T: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    norm: NormInto | None = None,
) -> torch.Tensor:
    """``residual + sum of the weighted experts``; a new tensor [T, D], or ``out``, which may be the residual itself.
    Deterministic; no host synchronisation on CUDA.

    Rows are put in the order of ``order_by_expert``. Where only some of the T K ids are in this bank, ``num_rows``
    says how many; the others are E or more, cost nothing and add nothing. Float8 matrices come with ``scales`` float32
    ([E, 2I], [E, D]); activations are then quantised too, before they are gathered and again after the gated
    activation, unless the device has no float8 products; ``x_TD`` may come quantised, with ``x_scale_T``. With block
    scales (four dimensions, see ``block_experts``) it comes plain. ``norm`` is taken of the result.
    """
    if num_rows == 0:
        out = residual_TD.clone() if out is None else out.copy_(residual_TD)
        if norm is not None:
            norm.take(out)
        return out
    if scales is not None and scales[0].ndim == 4:
        rows = aligned_rows(ids_TK, len(gate_up_E2ID), num_rows)
        out_MD = block_experts_rows(x_TD, rows, gate_up_E2ID, down_EDI, scales)
        return combine(out_MD, rows.order.row_of_slot_TK, weights_TK, residual_TD, out, norm)
    order = order_by_expert(ids_TK, len(gate_up_E2ID), num_rows)
    if scales is None:
        out_RD = expert_rows(x_TD, order, gate_up_E2ID, down_EDI)
    elif x_scale_T is None and not has_float8(x_TD.device):  # the weights only
        rows_RD, dtype = permute(x_TD, order), residual_TD.dtype
        hidden_RI = swiglu(scaled_grouped_mm(rows_RD, None, gate_up_E2ID, scales[0], order.ends_E, dtype))
        out_RD = scaled_grouped_mm(hidden_RI, None, down_EDI, scales[1], order.ends_E, dtype)
    else:
        if x_scale_T is None:
            rows_RD, scale_R = permute_quantize(x_TD, order)
        else:
            rows_RD, scale_R = permute(x_TD, order), x_scale_T.index_select(0, order.token_of_row_R)
        both_R2I = scaled_grouped_mm(rows_RD, scale_R, gate_up_E2ID, scales[0], order.ends_E, residual_TD.dtype)
        hidden_RI, scale_R = swiglu_quantize(both_R2I)
        out_RD = scaled_grouped_mm(hidden_RI, scale_R, down_EDI, scales[1], order.ends_E, residual_TD.dtype)
    return combine(out_RD, order.row_of_slot_TK, weights_TK, residual_TD, out, norm)


def ref_combine(
    rows_RD: torch.Tensor, row_of_slot_TK: torch.Tensor, weights_TK: torch.Tensor, residual_TD: torch.Tensor
) -> torch.Tensor:
    """``residual + sum_k weights[t, k] * rows[row_of_slot[t, k]]``: the sum in float32, rounded before the residual
    is added. A slot whose row is negative adds nothing.
    """
    total = torch.zeros(residual_TD.shape, dtype=torch.float32, device=residual_TD.device)
    for k in range(weights_TK.shape[1]):
        row = row_of_slot_TK[:, k]
        added = rows_RD.index_select(0, row.clamp(min=0)).float() * weights_TK[:, k, None].float()
        total += added.masked_fill(row[:, None] < 0, 0.0)
    return residual_TD + total.to(residual_TD.dtype)


def ref_combine_rms_norm(
    rows_RD: torch.Tensor,
    row_of_slot_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    residual_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ref_combine``, and ``ref_rms_norm`` of its rounded result."""
    combined = ref_combine(rows_RD, row_of_slot_TK, weights_TK, residual_TD)
    return combined, ref_rms_norm(combined, norm_D, eps)


def combine(
    rows_RD: torch.Tensor,
    row_of_slot_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    residual_TD: torch.Tensor,
    out: torch.Tensor | None = None,
    norm: NormInto | None = None,
) -> torch.Tensor:
    """Gather each token's K expert rows, weigh, add to the residual; a new tensor [T, D], or ``out``. ``norm`` is taken
    of that in the same pass.
    """
    assert len(row_of_slot_TK) == len(weights_TK) == len(residual_TD), (row_of_slot_TK.shape, residual_TD.shape)
    if use_triton(rows_RD):
        from .kernels.combine import combine_kernel, combine_rms_norm_kernel

        if norm is None:
            return combine_kernel(rows_RD, row_of_slot_TK, weights_TK, residual_TD, out)
        return combine_rms_norm_kernel(
            rows_RD, row_of_slot_TK, weights_TK, residual_TD, norm.weight, norm.eps, *norm.tensors, out
        )
    # A bag of rows with weights is what an embedding bag sums, in float32, in one pass over the rows.
    weights = weights_TK.to(rows_RD.dtype).masked_fill(row_of_slot_TK < 0, 0.0)
    total = F.embedding_bag(row_of_slot_TK.clamp(min=0), rows_RD, per_sample_weights=weights, mode="sum")
    combined = torch.add(residual_TD, total, out=total if out is None else out)
    if norm is not None:
        norm.take(combined)
    return combined
