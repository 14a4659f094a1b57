"""The routed experts of one layer on local tokens. T tokens, D channels, E experts, I expert channels, K top-k, R = T
K rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import use_triton
from .block_experts import aligned_rows, block_experts_rows
from .grouped import grouped_mm, scaled_grouped_mm
from .quantize import quantize_rows, swiglu_quantize
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
) -> torch.Tensor:
    """``residual + sum of the weighted experts``; a new tensor [T, D]. Deterministic; no host synchronisation on CUDA.

    Rows are sorted by expert (stable), so that an expert's rows are contiguous; ``slot_of_row`` remembers where each
    came from. Where only some of the T K ids are in this bank, ``num_rows`` says how many; the others are E or more,
    cost nothing and add nothing. Float8 matrices come with ``scales`` float32 ([E, 2I], [E, D]); activations are then
    quantised too, before they are gathered and again after the gated activation; ``x_TD`` may come quantised, with
    ``x_scale_T``. With block scales (four dimensions, see ``block_experts``) it comes plain.
    """
    num_experts, top_k = gate_up_E2ID.shape[0], ids_TK.shape[1]
    if num_rows is not None:
        if num_rows == 0:
            return residual_TD.clone()
        weights_TK = weights_TK.masked_fill(ids_TK >= num_experts, 0.0)
    if scales is not None and scales[0].ndim == 4:
        rows = aligned_rows(ids_TK, num_experts, num_rows)
        out_MD = block_experts_rows(x_TD, rows, gate_up_E2ID, down_EDI, scales)
        return combine(out_MD, rows.row_of_slot, weights_TK, residual_TD)
    sorted_ids, slot_of_row = torch.sort(ids_TK.flatten(), stable=True)
    slot_of_row = slot_of_row[:num_rows]
    ends = torch.searchsorted(sorted_ids, torch.arange(num_experts, device=x_TD.device), right=True, out_int32=True)
    token_of_row = slot_of_row // top_k
    if scales is None:
        rows_RD = x_TD.index_select(0, token_of_row)
        out_RD = grouped_mm(swiglu(grouped_mm(rows_RD, gate_up_E2ID, ends)), down_EDI, ends)
    else:
        values_TD, scale_T = quantize_rows(x_TD) if x_scale_T is None else (x_TD, x_scale_T)
        rows_RD, scale_R = _gather_bytes(values_TD, token_of_row), scale_T.index_select(0, token_of_row)
        both_R2I = scaled_grouped_mm(rows_RD, scale_R, gate_up_E2ID, scales[0], ends, residual_TD.dtype)
        hidden_RI, scale_R = swiglu_quantize(both_R2I)
        out_RD = scaled_grouped_mm(hidden_RI, scale_R, down_EDI, scales[1], ends, residual_TD.dtype)
    row_of_slot = torch.zeros_like(sorted_ids, dtype=torch.int64)  # an id elsewhere reads row 0 with weight 0
    row_of_slot[slot_of_row] = torch.arange(len(slot_of_row), device=x_TD.device)
    return combine(out_RD, row_of_slot.view(-1, top_k), weights_TK, residual_TD)


def _gather_bytes(values_TD: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``index_select`` of float8 rows, which torch does not have for the type itself."""
    return values_TD.view(torch.uint8).index_select(0, rows).view(values_TD.dtype)


def ref_combine(
    rows_RD: torch.Tensor, row_of_slot_TK: torch.Tensor, weights_TK: torch.Tensor, residual_TD: torch.Tensor
) -> torch.Tensor:
    """``residual + sum_k weights[t, k] * rows[row_of_slot[t, k]]``: the sum in float32, rounded before the residual
    is added.
    """
    total = torch.zeros(residual_TD.shape, dtype=torch.float32, device=residual_TD.device)
    for k in range(weights_TK.shape[1]):
        total += rows_RD.index_select(0, row_of_slot_TK[:, k]).float() * weights_TK[:, k, None].float()
    return residual_TD + total.to(residual_TD.dtype)


def combine(
    rows_RD: torch.Tensor, row_of_slot_TK: torch.Tensor, weights_TK: torch.Tensor, residual_TD: torch.Tensor
) -> torch.Tensor:
    """Gather each token's K expert rows, weigh, add to the residual; a new tensor [T, D]."""
    assert len(row_of_slot_TK) == len(weights_TK) == len(residual_TD), (row_of_slot_TK.shape, residual_TD.shape)
    if use_triton(rows_RD):
        from .kernels.combine import combine_kernel

        return combine_kernel(rows_RD, row_of_slot_TK, weights_TK, residual_TD)
    # A bag of rows with weights is what an embedding bag sums, in float32, in one pass over the rows.
    total = F.embedding_bag(row_of_slot_TK, rows_RD, per_sample_weights=weights_TK.to(rows_RD.dtype), mode="sum")
    return total.add_(residual_TD)
