"""Softmax, top-k and renormalisation of router logits in one pass. T tokens, E experts, K top-k."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NAN = tl.constexpr(0x7FFFFFFF)  # above every score, as torch.topk has it, and itself not a number


@triton.jit
def _top_k_kernel(
    logits_ptr,
    weights_ptr,
    ids_ptr,
    T,
    stride,
    E,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    E_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, E_BLOCK)[None, :]
    inside = (row < T)[:, None] & (expert < E)
    x = tl.load(logits_ptr + row.to(tl.int64)[:, None] * stride + expert, mask=inside, other=-float("inf"))
    x = x.to(tl.float32)
    exponentials = tl.exp(x - tl.max(x, axis=1)[:, None])
    scores = exponentials / tl.sum(exponentials, axis=1)[:, None]
    # Scores are not negative, so their bits order as they do; the id below them makes keys distinct, lower ids first.
    bits = tl.where(scores == scores, scores.to(tl.int32, bitcast=True), _NAN)
    keys = (tl.where(expert < E, bits, -1).to(tl.int64) << 32) | (E_BLOCK - 1 - expert).to(tl.int64)
    place = tl.arange(0, K_BLOCK)[None, :]
    best_bits = tl.zeros([ROWS, K_BLOCK], dtype=tl.int32)
    ids = tl.zeros([ROWS, K_BLOCK], dtype=tl.int64)
    for k in tl.static_range(K):
        best = tl.max(keys, axis=1)[:, None]
        keys = tl.where(keys == best, -1, keys)
        ids = tl.where(place == k, E_BLOCK - 1 - (best & (E_BLOCK - 1)), ids)
        best_bits = tl.where(place == k, (best >> 32).to(tl.int32), best_bits)
    weights = best_bits.to(tl.float32, bitcast=True)  # zero past K
    if NORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    target = row.to(tl.int64)[:, None] * K + place
    stored = (row < T)[:, None] & (place < K)
    tl.store(weights_ptr + target, weights.to(weights_ptr.dtype.element_ty), mask=stored)
    tl.store(ids_ptr + target, ids, mask=stored)


def top_k_kernel(
    logits_TE: torch.Tensor, top_k: int, *, normalize: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] in ``dtype`` and ids int64 [T, K], best first; of equal scores the lower id first."""
    T, E = logits_TE.shape
    assert logits_TE.stride(1) == 1, logits_TE.stride()
    weights = torch.empty(T, top_k, dtype=dtype, device=logits_TE.device)
    ids = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
    if T:
        e_block = triton.next_power_of_2(E)
        rows = max(4, 2048 // e_block)
        _top_k_kernel[(triton.cdiv(T, rows),)](
            logits_TE,
            weights,
            ids,
            T,
            logits_TE.stride(0),
            E,
            K=top_k,
            NORMALIZE=normalize,
            ROWS=rows,
            E_BLOCK=e_block,
            K_BLOCK=triton.next_power_of_2(top_k),
            num_warps=4,
        )
    return weights, ids
