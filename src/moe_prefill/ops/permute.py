"""The order in which experts see rows. T tokens, K top-k, E experts, D channels, R rows of this bank.

A slot is one of a token's K choices. Rows are slots sorted by expert, an expert's rows in the order of their slots, so
that each expert reads one contiguous range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backend import use_triton


@dataclass(frozen=True, slots=True, eq=False)
class ExpertOrder:
    """Where every slot's row is, and back. Expert e has rows ``ends_E[e - 1]:ends_E[e]``."""

    ends_E: torch.Tensor  # int32, non-decreasing, its last entry R
    token_of_row_R: torch.Tensor
    row_of_slot_TK: torch.Tensor  # -1 where the slot's expert is not in this bank


def ref_order_by_expert(ids_TK: torch.Tensor, num_experts: int, num_rows: int | None = None) -> ExpertOrder:
    """The order by a stable sort. Ids of E or more are of no expert here; ``num_rows`` says how many are below, where
    not all are.

    Two tokens with ids [[1, 0], [1, 2]] and three experts: ends [1, 3, 4], tokens [0, 0, 1, 1], rows [[1, 0], [2, 3]].
    """
    sorted_ids, slot_of_row = torch.sort(ids_TK.flatten(), stable=True)
    slot_of_row = slot_of_row[:num_rows]
    experts = torch.arange(num_experts, device=ids_TK.device)
    row_of_slot = torch.full_like(sorted_ids, -1, dtype=torch.int64)
    row_of_slot[slot_of_row] = torch.arange(len(slot_of_row), device=ids_TK.device)
    return ExpertOrder(
        torch.searchsorted(sorted_ids, experts, right=True, out_int32=True),
        slot_of_row // ids_TK.shape[1],
        row_of_slot.view(ids_TK.shape),
    )


def order_by_expert(ids_TK: torch.Tensor, num_experts: int, num_rows: int | None = None) -> ExpertOrder:
    """``ref_order_by_expert``; on a GPU a counting sort in place of the comparison sort, with int32 rows and tokens."""
    assert num_rows is None or 0 <= num_rows <= ids_TK.numel(), (num_rows, ids_TK.shape)
    if use_triton(ids_TK):
        from .kernels.order import order_by_expert_kernel

        rows = ids_TK.numel() if num_rows is None else num_rows
        return ExpertOrder(*order_by_expert_kernel(ids_TK, num_experts, rows))
    return ref_order_by_expert(ids_TK, num_experts, num_rows)


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
