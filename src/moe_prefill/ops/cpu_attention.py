"""Attention on a CPU as plain matrix products over blocks whose scores stay in the cache.

Faster than torch's flash kernel for CPUs up to some thousand keys, where the blocks leave the cache (measured with
AVX-512, BF16 and float32). The query heads of a key/value head are rows of one product, so keys are never repeated.

Q query rows and K key rows, of one entry or of all; H query heads, G key/value heads, d channels, B entries of equal
shape, R = H / G n rows of a product for n queries.
"""

from __future__ import annotations

import math

import torch

from .script import scripted

MOST_KEYS = 1024
LEAST_ROWS = 64  # of an entry that is worth products of its own
_BLOCK_SCORES = 1 << 18  # float32 scores of a block and key/value head: a megabyte of cache


@scripted
def large_entries_(
    q_QHd: torch.Tensor,
    k_KGd: torch.Tensor,
    v_KGd: torch.Tensor,
    out_QHd: torch.Tensor,
    lse_QH: torch.Tensor,
    q_spans: list[tuple[int, int]],
    k_spans: list[tuple[int, int]],
    need_lse: list[bool],
    causal: bool,
    window: int,
    scale: float,
) -> None:
    """Each entry by itself: its rows of ``out`` and of ``lse`` are written, zero where the latter is not needed.

    No window is one of 0. With causal order no entry has more queries than keys.
    """
    for i in range(len(q_spans)):
        q0, q1 = q_spans[i]
        k0, k1 = k_spans[i]
        _one_entry_(
            q_QHd[q0:q1],
            k_KGd[k0:k1],
            v_KGd[k0:k1],
            out_QHd[q0:q1],
            lse_QH[q0:q1],
            need_lse[i],
            causal,
            window,
            scale,
        )


def _one_entry_(
    q_QHd: torch.Tensor,
    k_KGd: torch.Tensor,
    v_KGd: torch.Tensor,
    out_QHd: torch.Tensor,
    lse_QH: torch.Tensor,
    need_lse: bool,
    causal: bool,
    window: int,
    scale: float,
) -> None:
    """A block of rows at a time against just the keys that it sees."""
    num_q, heads, dim = q_QHd.shape
    num_k, kv_heads = k_KGd.shape[0], k_KGd.shape[1]
    groups, shift = heads // kv_heads, num_k - num_q if causal else 0
    step = _block_rows(groups * num_k)
    queries = q_QHd.view(num_q, kv_heads, groups, dim).permute(1, 2, 0, 3)
    out = out_QHd.view(num_q, kv_heads, groups, dim).permute(1, 2, 0, 3)
    lse = lse_QH.zero_().view(num_q, kv_heads, groups).permute(1, 2, 0)
    keys, values = k_KGd.float().permute(1, 2, 0), _padded(v_KGd, step).transpose(0, 1)
    # A block ends at a multiple of its size, counted in keys: so the products with values come in few shapes.
    low, high = 0, min(num_q, step - shift % step)
    while low < num_q:
        first = max(0, low + shift - window + 1) // step * step if window > 0 else 0
        last = high + shift if causal else num_k
        end = first + -(-(last - first) // step) * step
        rows = _float32(queries[:, :, low:high]).view(kv_heads, -1, dim)
        found, found_lse = _block(
            rows, keys[:, :, first:last], values[:, first:end], high - low, causal, window, scale, need_lse
        )
        out[:, :, low:high].copy_(found.view(kv_heads, groups, -1, dim))
        if need_lse:
            lse[:, :, low:high].copy_(found_lse.view(kv_heads, groups, -1))
        low, high = high, min(num_q, high + step)


@scripted
def equal_entries(
    q_BnHd: torch.Tensor, k_BKGd: torch.Tensor, v_BKGd: torch.Tensor, causal: bool, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Small entries of one shape at once: [B n, H, d] in the dtype of the queries and log-sum-exp [B n, H]."""
    batch, num_q, heads, dim = q_BnHd.shape
    num_k, kv_heads = k_BKGd.shape[1], k_BKGd.shape[2]
    groups = heads // kv_heads
    split = q_BnHd.view(batch, num_q, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
    rows = _float32(split).view(batch * kv_heads, groups * num_q, dim)
    keys = _float32(k_BKGd.transpose(1, 2)).view(batch * kv_heads, num_k, dim).transpose(1, 2)
    values = _float32(v_BKGd.transpose(1, 2)).view(batch * kv_heads, num_k, dim)
    out, lse = _block(rows, keys, values, num_q, causal, window, scale, True)
    out = out.to(q_BnHd.dtype).view(batch, kv_heads, groups, num_q, dim).permute(0, 3, 1, 2, 4)
    lse = lse.view(batch, kv_heads, groups, num_q).permute(0, 3, 1, 2)
    return out.reshape(batch * num_q, heads, dim), lse.reshape(batch * num_q, heads)


def entries_at_once(heads: int, num_q: int, num_k: int) -> int:
    """How many entries of equal shape one call of ``equal_entries`` should be given."""
    return max(1, _BLOCK_SCORES // (heads * num_q * num_k))


def _block(
    rows_GRd: torch.Tensor,
    keys_GdK: torch.Tensor,
    values_GKd: torch.Tensor,
    num_q: int,
    causal: bool,
    window: int,
    scale: float,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of float32 rows and keys for ``num_q`` queries, which see the last keys: [G, R, d] in the dtype
    of the values and log-sum-exp [G, R].

    Weights are rounded to the dtype of the values for their product, as GPU kernels do. Values may be padded behind the
    keys.
    """
    scores = torch.baddbmm(rows_GRd.new_empty([1]), rows_GRd, keys_GdK, beta=0.0, alpha=scale)
    if causal:
        num_keys = scores.shape[2]
        hidden = _hidden(num_q, num_keys, window, scores)
        scores.view(scores.shape[0], -1, num_q, num_keys)[:, :, :, num_keys - hidden.shape[1] :].add_(hidden)
    lse = scores.amax([-1]) if need_lse else scores
    weights = torch.softmax(scores, -1)
    if need_lse:
        # The largest weight is exp(largest score - lse): cheaper than exponentials of our own.
        lse = lse.sub_(weights.amax([-1]).log_())
    return torch.bmm(_narrow(weights, values_GKd), values_GKd), lse


def _hidden(num_q: int, num_k: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """What to add to the scores of the last keys: -inf where a query does not see one. Without a window all see the
    keys before those of the queries.
    """
    if window == 0:
        return torch.full([num_q, num_q], -math.inf, dtype=like.dtype).triu_(1)
    hidden = torch.full([num_q, num_k], -math.inf, dtype=like.dtype)
    return hidden.triu(num_k - num_q + 1).add_(hidden.tril_(num_k - num_q - window))


def _narrow(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The weights as their product with the values takes them: in their dtype, with a zero for each padding row."""
    num_keys, width = weights.shape[2], values.shape[1]
    if width == num_keys:
        return weights.to(values.dtype)
    narrow = torch.empty([weights.shape[0], weights.shape[1], width], dtype=values.dtype)
    narrow[:, :, :num_keys].copy_(weights)
    narrow[:, :, num_keys:].zero_()
    return narrow


def _padded(values: torch.Tensor, step: int) -> torch.Tensor:
    """Values with zeros behind them up to a multiple of ``step`` rows: the CPU's bfloat16 product is compiled for every
    number of rows.
    """
    num_rows = values.shape[0]
    padded = values.new_empty([-(-num_rows // step) * step, values.shape[1], values.shape[2]])
    padded[:num_rows].copy_(values)
    padded[num_rows:].zero_()
    return padded


def _block_rows(row_scores: int, most: int = _BLOCK_SCORES) -> int:
    """Rows of a block whose scores stay in the cache: 64, 32 or 16."""
    if 64 * row_scores <= most:
        return 64
    return 32 if 32 * row_scores <= most else 16


def _float32(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: cast and laid out in one pass."""
    return torch.empty(x.shape, dtype=torch.float32).copy_(x)
