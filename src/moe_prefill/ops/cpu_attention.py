"""Attention on a CPU as plain matrix products over blocks whose scores stay in the cache.

Faster than torch's flash kernel for CPUs up to some thousand keys, where the blocks leave the cache (measured with
AVX-512, BF16 and float32). The query heads of a key/value head are rows of one product, so keys are never repeated.

n query rows and K keys of an entry, H query heads, G key/value heads, d channels, B entries of equal shape, R = H / G n
rows of a product.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Protocol

import torch

from .masks import visible

_MOST_KEYS = 1024
_BLOCK_SCORES = 1 << 18  # float32 scores of a block and key/value head: a megabyte of cache
_FEWEST_ROWS = 64  # of an entry that is worth a call of its own


class Attention(Protocol):
    """Entries of one shape: queries [B, n, H, d], keys and values [B, K, G, d]; written are the output [B, n, H, d] and
    its float32 log-sum-exp [B, n, H].
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        /,
        *,
        causal: bool,
        window: int | None,
        scale: float,
    ) -> None: ...


def suits(q: torch.Tensor, num_q: int, num_k: int, causal: bool) -> bool:
    """Whether entries of this shape go through here. Every row must see a key."""
    narrow = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)
    return narrow and num_k <= _MOST_KEYS and not (causal and num_q > num_k)


def attention_for(heads: int, num_q: int, num_k: int) -> tuple[Attention, int]:
    """The function for entries of a shape, and how many of them it should be given at once."""
    if min(num_q, num_k) >= _FEWEST_ROWS:
        return one_entry_, 1
    return equal_entries_, max(1, _BLOCK_SCORES // (heads * num_q * num_k))


def one_entry_(
    q_1nHd: torch.Tensor,
    k_1KGd: torch.Tensor,
    v_1KGd: torch.Tensor,
    out_1nHd: torch.Tensor,
    lse_1nH: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """A large entry, a block of rows at a time against just the keys that it sees."""
    (num_q, heads, dim), (num_k, kv_heads) = q_1nHd.shape[1:], k_1KGd.shape[1:3]
    groups, shift = heads // kv_heads, num_k - num_q if causal else 0
    step = _block_rows(groups * num_k)
    queries, outs = (t.view(num_q, kv_heads, groups, dim).permute(1, 2, 0, 3) for t in (q_1nHd, out_1nHd))
    lses = lse_1nH.view(num_q, kv_heads, groups).permute(1, 2, 0)
    keys, values = k_1KGd[0].float().permute(1, 2, 0), _padded(v_1KGd[0], step).transpose(0, 1)
    # A block ends at a multiple of its size, counted in keys: so the products with values come in few shapes.
    edges = [0, *range(step - shift % step, num_q, step), num_q]
    for low, high in itertools.pairwise(edges):
        first = 0 if window is None else max(0, low + shift - window + 1) // step * step
        last = high + shift if causal else num_k
        mask = _mask(high - low, last - first, window) if causal else None
        rows = _float32(queries[:, :, low:high]).view(kv_heads, -1, dim)
        padded = first + -(-(last - first) // step) * step
        found, found_lse = _block(rows, keys[:, :, first:last], values[:, first:padded], mask, scale)
        outs[:, :, low:high].copy_(found.view(kv_heads, groups, -1, dim))
        lses[:, :, low:high].copy_(found_lse.view(kv_heads, groups, -1))


def equal_entries_(
    q_BnHd: torch.Tensor,
    k_BKGd: torch.Tensor,
    v_BKGd: torch.Tensor,
    out_BnHd: torch.Tensor,
    lse_BnH: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """Small entries of one shape at once."""
    batch, num_q, _, dim = q_BnHd.shape
    num_k, kv_heads = k_BKGd.shape[1:3]
    queries, outs = (t.view(batch, num_q, kv_heads, -1, dim).permute(0, 2, 3, 1, 4) for t in (q_BnHd, out_BnHd))
    lses = lse_BnH.view(batch, num_q, kv_heads, -1).permute(0, 2, 3, 1)
    rows = _float32(queries).view(batch * kv_heads, -1, dim)
    keys, values = (_float32(t.transpose(1, 2)).view(batch * kv_heads, num_k, dim) for t in (k_BKGd, v_BKGd))
    mask = _mask(num_q, num_k, window) if causal else None
    found, found_lse = _block(rows, keys.transpose(1, 2), values, mask, scale)
    outs.copy_(found.view(outs.shape))
    lses.copy_(found_lse.view(lses.shape))


def _block(
    rows_GRd: torch.Tensor, keys_GdK: torch.Tensor, values_GKd: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of float32 rows and keys; [G, R, d] in the dtype of the values, log-sum-exp [G, R, 1].

    Weights are rounded to the dtype of the values for their product, as GPU kernels do. ``mask`` is added to the scores
    of the last keys. Values may be padded behind the keys. Exponentials are of two: they take half the time.
    """
    scores = torch.baddbmm(rows_GRd.new_empty(()), rows_GRd, keys_GdK, beta=0, alpha=scale * math.log2(math.e))
    if mask is not None:
        scores.view(len(scores), -1, len(mask), scores.shape[-1])[..., -mask.shape[1] :].add_(mask)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp2_()
    total = weights.sum(-1, keepdim=True)
    lse = highest.add_(total.log2()).mul_(math.log(2))
    return torch.bmm(_narrow(weights.mul_(total.reciprocal_()), values_GKd), values_GKd), lse


def _narrow(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The weights as their product with the values takes them: in their dtype, with a zero for each padding row."""
    num_keys = weights.shape[2]
    if values.shape[1] == num_keys:
        return weights.to(values.dtype)
    narrow = values.new_empty(*weights.shape[:2], values.shape[1])
    narrow[..., :num_keys] = weights
    narrow[..., num_keys:] = 0
    return narrow


def _padded(values: torch.Tensor, step: int) -> torch.Tensor:
    """Values with zeros behind them up to a multiple of ``step`` rows: the CPU's bfloat16 product is compiled for every
    number of rows.
    """
    padded = values.new_empty(-(-len(values) // step) * step, *values.shape[1:])
    padded[: len(values)] = values
    padded[len(values) :] = 0
    return padded


def _block_rows(row_scores: int) -> int:
    """Rows of a block whose scores stay in the cache: 64, 32 or 16."""
    return next((rows for rows in (64, 32) if rows * row_scores <= _BLOCK_SCORES), 16)


def _float32(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: cast and laid out in one pass."""
    return x.new_empty(x.shape, dtype=torch.float32).copy_(x)


@functools.lru_cache(maxsize=512)
def _mask(num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
    """What to add to the scores' last columns; only the last ``num_queries`` of them hide anything without a window."""
    width = num_queries if window is None else num_keys
    seen = visible(num_queries, width, causal=True, window=window, device=torch.device("cpu"))
    assert seen is not None
    return torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
