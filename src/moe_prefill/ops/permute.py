"""The order in which experts see rows. T tokens, K top-k, E experts, D channels, R rows of this bank.

A slot is one of a token's K choices. Rows are slots sorted by expert, an expert's rows in the order of their slots, so
that each expert reads one contiguous range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backend import use_triton
from .quantize import ref_quantize_rows


@dataclass(frozen=True, slots=True, eq=False)
class ExpertOrder:
    """Where every slot's row is, and back. Expert e has rows ``ends_E[e - 1]:ends_E[e]``. Where these are aligned, rows
    that belong to no slot fill them up, and R is the most that any ids can take.
    """

    ends_E: torch.Tensor  # int32, non-decreasing; the last entry is R where nothing is aligned
    token_of_row_R: torch.Tensor  # 0 where a row belongs to no slot
    row_of_slot_TK: torch.Tensor  # -1 where the slot's expert is not in this bank


def ref_order_by_expert(
    ids_TK: torch.Tensor, num_experts: int, num_rows: int | None = None, alignment: int = 1
) -> ExpertOrder:
    """The order by a stable sort. Ids of E or more are of no expert here; ``num_rows`` says how many are below, where
    not all are. Each expert's rows begin at a multiple of ``alignment``.

    Two tokens with ids [[1, 0], [1, 2]] and three experts: ends [1, 3, 4], tokens [0, 0, 1, 1], rows [[1, 0], [2, 3]].
    """
    sorted_ids, slot_of_row = torch.sort(ids_TK.flatten(), stable=True)
    sorted_ids, slot_of_row = sorted_ids[:num_rows], slot_of_row[:num_rows]
    experts = torch.arange(num_experts, device=ids_TK.device)
    dense_ends = torch.searchsorted(sorted_ids, experts, right=True)
    counts = torch.diff(dense_ends, prepend=dense_ends.new_zeros(1))
    ends = ((counts + alignment - 1) // alignment * alignment).cumsum(0)
    fill = (ends - dense_ends) - (ends - dense_ends).diff(prepend=ends.new_zeros(1))  # that of earlier experts
    row = torch.arange(len(slot_of_row), device=ids_TK.device) + fill.index_select(0, sorted_ids)
    row_of_slot = torch.full((ids_TK.numel(),), -1, device=ids_TK.device)
    row_of_slot[slot_of_row] = row
    token_of_row = row.new_zeros(_most_rows(len(row), num_experts, alignment))
    token_of_row[row] = slot_of_row // ids_TK.shape[1]
    return ExpertOrder(ends.int(), token_of_row, row_of_slot.view(ids_TK.shape))


def order_by_expert(
    ids_TK: torch.Tensor, num_experts: int, num_rows: int | None = None, alignment: int = 1
) -> ExpertOrder:
    """``ref_order_by_expert``; on a GPU a counting sort in place of the comparison sort, with int32 rows and tokens."""
    assert num_rows is None or 0 <= num_rows <= ids_TK.numel(), (num_rows, ids_TK.shape)
    if use_triton(ids_TK):
        from .kernels.order import order_by_expert_kernel

        rows = ids_TK.numel() if num_rows is None else num_rows
        most = _most_rows(rows, num_experts, alignment)
        return ExpertOrder(*order_by_expert_kernel(ids_TK, num_experts, most, alignment))
    return ref_order_by_expert(ids_TK, num_experts, num_rows, alignment)


def _most_rows(num_rows: int, num_experts: int, alignment: int) -> int:
    """The most that ``num_rows`` rows can take when each expert's are aligned: known without the ids."""
    used = min(num_rows, num_experts)
    return (num_rows + used * (alignment - 1)) // alignment * alignment


def ref_permute(x_TD: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Row r is ``x[token_of_row[r]]``; a new tensor [R, D]."""
    if x_TD.element_size() == 1:  # torch gathers bytes, but no float8
        return x_TD.view(torch.uint8).index_select(0, order.token_of_row_R).view(x_TD.dtype)
    return x_TD.index_select(0, order.token_of_row_R)


def permute(x_TD: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """``ref_permute``; on a GPU every token is read once and written K times, rather than read K times."""
    assert len(x_TD) == len(order.row_of_slot_TK), (x_TD.shape, order.row_of_slot_TK.shape)
    if use_triton(x_TD):
        from .kernels.permute import permute_kernel

        return permute_kernel(x_TD, order.row_of_slot_TK, len(order.token_of_row_R))
    return ref_permute(x_TD, order)


def permute_quantize(x_TD: torch.Tensor, order: ExpertOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_rows``, then ``permute`` of values and scales: float8 [R, D] and float32 [R]."""
    assert len(x_TD) == len(order.row_of_slot_TK), (x_TD.shape, order.row_of_slot_TK.shape)
    if use_triton(x_TD):
        from .kernels.permute import permute_quantize_kernel

        return permute_quantize_kernel(x_TD, order.row_of_slot_TK, len(order.token_of_row_R))
    values_TD, scale_T = ref_quantize_rows(x_TD)
    return ref_permute(values_TD, order), scale_T.index_select(0, order.token_of_row_R)
