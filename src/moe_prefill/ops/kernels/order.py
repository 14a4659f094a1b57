"""A stable counting sort of expert ids. N slots (tokens times top-k), E experts, B blocks of slots.

Counts a block, their running sum over blocks for each expert, then every slot's place: its expert's start, what
earlier blocks hold of the expert, and its rank among equals in the block. No atomics, so the order is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SLOTS = 128  # of a block: ranks compare each slot with all of its block
_STEP = 32
_SCANNED = 1024  # blocks that are summed at a time


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, N, E, num_blocks, SLOTS: tl.constexpr, STEP: tl.constexpr, E_BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    expert = tl.arange(0, E_BLOCK)
    counts = tl.zeros([E_BLOCK, STEP], dtype=tl.int32)
    for first in range(0, SLOTS, STEP):
        slot = block * SLOTS + first + tl.arange(0, STEP)
        ids = tl.load(ids_ptr + slot, mask=slot < N, other=-1).to(tl.int32)
        counts += (expert[:, None] == ids[None, :]).to(tl.int32)
    tl.store(counts_ptr + expert * num_blocks + block, tl.sum(counts, axis=1), mask=expert < E)


@triton.jit
def _scan_kernel(counts_ptr, totals_ptr, num_blocks, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    total = expert * 0  # a tensor, not a constant: it changes in the loop
    first = total
    while first < num_blocks:
        block = first + tl.arange(0, BLOCK)
        target = counts_ptr + expert * num_blocks + block
        counts = tl.load(target, mask=block < num_blocks, other=0)
        tl.store(target, total + tl.cumsum(counts, axis=0) - counts, mask=block < num_blocks)
        total += tl.sum(counts, axis=0)
        first += BLOCK
    tl.store(totals_ptr + expert, tl.cdiv(total, ALIGNMENT) * ALIGNMENT)


@triton.jit
def _place_kernel(
    ids_ptr,
    earlier_ptr,
    ends_ptr,
    token_of_row_ptr,
    row_of_slot_ptr,
    N,
    R,
    E,
    num_blocks,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):
    block = tl.program_id(0)
    own = tl.arange(0, SLOTS)
    slot = block * SLOTS + own
    ids = tl.load(ids_ptr + slot, mask=slot < N, other=-1).to(tl.int32)
    before = tl.zeros([SLOTS, STEP], dtype=tl.int32)
    for first in range(0, SLOTS, STEP):
        other = first + tl.arange(0, STEP)
        others = tl.load(ids_ptr + block * SLOTS + other, mask=block * SLOTS + other < N, other=-1).to(tl.int32)
        before += ((ids[:, None] == others[None, :]) & (other[None, :] < own[:, None])).to(tl.int32)
    here = (ids >= 0) & (ids < E)
    start = tl.load(ends_ptr + ids - 1, mask=here & (ids > 0), other=0)
    earlier = tl.load(earlier_ptr + ids * num_blocks + block, mask=here, other=0)
    row = start + earlier + tl.sum(before, axis=1)
    tl.store(row_of_slot_ptr + slot, tl.where(here, row, -1), mask=slot < N)
    tl.store(token_of_row_ptr + row, slot // K, mask=here & (row < R))


def order_by_expert_kernel(
    ids_TK: torch.Tensor, num_experts: int, num_rows: int, alignment: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ends [E], token of each row [R] and row of each slot [T, K], all int32; see ``ref_order_by_expert``. ``num_rows``
    is R, alignment rows included.
    """
    ids = ids_TK.contiguous()
    num_slots = ids.numel()
    num_blocks = max(1, triton.cdiv(num_slots, _SLOTS))
    counts = torch.empty(num_experts, num_blocks, dtype=torch.int32, device=ids.device)
    totals = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    make = torch.empty if alignment == 1 else torch.zeros
    token_of_row = make(num_rows, dtype=torch.int32, device=ids.device)
    row_of_slot = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    size = {"SLOTS": _SLOTS, "STEP": _STEP}
    e_block = triton.next_power_of_2(num_experts)
    _count_kernel[(num_blocks,)](
        ids, counts, num_slots, num_experts, num_blocks, **size, E_BLOCK=e_block, num_warps=4 if e_block <= 128 else 8
    )
    scanned = min(_SCANNED, triton.next_power_of_2(num_blocks))
    _scan_kernel[(num_experts,)](counts, totals, num_blocks, ALIGNMENT=alignment, BLOCK=scanned)
    ends = totals.cumsum(0, dtype=torch.int32)
    _place_kernel[(num_blocks,)](
        ids,
        counts,
        ends,
        token_of_row,
        row_of_slot,
        num_slots,
        num_rows,
        num_experts,
        num_blocks,
        K=ids.shape[1],
        **size,
        num_warps=4,
    )
    return ends, token_of_row, row_of_slot
