"""Packed variable-length attention with log-sum-exp out.

Q query rows, K key rows, H query heads, G key/value heads, d channels, N entries. At this boundary log-sum-exp is
float32, natural logarithm, [Q, H]; a query without keys gives (0, -inf).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from .flash import flash, is_legal

_BLOCK_LEAST_ROWS, _BLOCK_MOST_KEYS = 64, 1024  # see _suits_row_blocks
_BLOCK_SCORES = 1 << 18  # float32 scores of a block and key/value head: a megabyte of cache
_MAX_BATCHED_SCORES = 1 << 24  # query x key pairs of one batched call of the plain version: bounds its workspace


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Entry i has queries ``cu_q[i]:cu_q[i+1]`` and keys ``cu_k[i]:cu_k[i+1]``; int32 [N + 1] on the host and on the
    device.
    """

    cu_q: np.ndarray
    cu_k: np.ndarray
    cu_q_device: torch.Tensor
    cu_k_device: torch.Tensor
    max_q: int
    max_k: int

    @classmethod
    def on(cls, device: torch.device, cu_q: np.ndarray, cu_k: np.ndarray) -> Spans:
        """Upload the offsets; synchronises, so not for use inside a sweep."""
        return cls(
            cu_q,
            cu_k,
            torch.as_tensor(cu_q, dtype=torch.int32, device=device),
            torch.as_tensor(cu_k, dtype=torch.int32, device=device),
            int(np.diff(cu_q).max(initial=0)),
            int(np.diff(cu_k).max(initial=0)),
        )


def ref_attention(
    q_QHd: torch.Tensor,
    k_KGd: torch.Tensor,
    v_KGd: torch.Tensor,
    spans: Spans,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention entry by entry in float32, straight from the definition."""
    out = torch.zeros_like(q_QHd)
    lse = torch.full(q_QHd.shape[:2], -torch.inf, device=q_QHd.device)
    groups = q_QHd.shape[1] // k_KGd.shape[1]
    for (q0, q1), (k0, k1) in zip(_pairs(spans.cu_q), _pairs(spans.cu_k), strict=True):
        if q1 == q0 or k1 == k0:
            continue
        keys = k_KGd[k0:k1].float().repeat_interleave(groups, dim=1)
        values = v_KGd[k0:k1].float().repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q_QHd[q0:q1].float(), keys) * scale
        mask = visible(q1 - q0, k1 - k0, causal=causal, window=window, device=q_QHd.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        lse[q0:q1] = scores.logsumexp(-1).t()
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
    return out, lse


def visible(
    num_queries: int, num_keys: int, *, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Boolean [queries, keys] of what may be seen, aligned at the end; None where everything may."""
    if not causal:
        return None
    row = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    column = torch.arange(num_keys, device=device)[None, :]
    mask = column <= row
    return mask if window is None else mask & (column > row - window)


def attention(
    q_QHd: torch.Tensor,
    k_KGd: torch.Tensor,
    v_KGd: torch.Tensor,
    spans: Spans,
    *,
    causal: bool,
    window: int | None = None,
    scale: float,
    need_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Q, H, d] in the dtype of ``q`` and log-sum-exp float32 [Q, H]; every query belongs to one entry.

    ``causal`` aligns queries and keys at the end; ``window`` (needs causal) is how many keys a query sees, itself
    included. Without ``need_lse`` the log-sum-exp may be left unset, or be +inf for queries without keys.
    """
    assert q_QHd.shape[1] % k_KGd.shape[1] == 0, (q_QHd.shape, k_KGd.shape)
    assert window is None or causal, "a window needs causal order"
    if is_legal(q_QHd):
        return flash(q_QHd, k_KGd, v_KGd, spans, causal=causal, window=window, scale=scale, need_lse=need_lse)
    return _by_shape(q_QHd, k_KGd, v_KGd, spans, causal=causal, window=window, scale=scale, need_lse=need_lse)


def _by_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Spans,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Large entries go through blocks of rows; of the others, those of equal shape share one batched call."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    num_q, num_k = np.diff(spans.cu_q), np.diff(spans.cu_k)
    blocked = _suits_row_blocks(q, num_q, num_k, causal)
    for entry in np.flatnonzero(blocked):
        rows, keys = slice(*spans.cu_q[entry : entry + 2].tolist()), slice(*spans.cu_k[entry : entry + 2].tolist())
        _row_blocks(
            q[rows],
            k[keys],
            v[keys],
            out[rows],
            lse[rows] if need_lse else None,
            causal=causal,
            window=window,
            scale=scale,
        )
    shapes = np.where(blocked, 0, num_q.astype(np.int64) << 32 | num_k)
    for shape in np.unique(shapes):
        entries = np.flatnonzero(shapes == shape)
        nq, nk = int(shape >> 32), int(shape & 0xFFFFFFFF)
        if nq == 0 or nk == 0:
            continue
        step = max(1, _MAX_BATCHED_SCORES // (nq * nk))
        for low in range(0, len(entries), step):
            part = entries[low : low + step]
            _one_shape(q, k, v, out, lse, spans.cu_q[part], spans.cu_k[part], nq, nk, causal, window, scale)
    return out, lse


def _suits_row_blocks(q: torch.Tensor, num_q: np.ndarray, num_k: np.ndarray, causal: bool) -> np.ndarray:
    """Which entries are faster as matrix products over blocks of rows than in torch's CPU flash kernel.

    Measured with AVX-512 (BF16 and float32): the flash kernel wins below some 64 rows, where calls cost more than
    work, and past 1024 keys, where blocks of scores leave the cache. A row without keys is the batched path's affair.
    """
    if q.device.type != "cpu":
        return np.zeros(len(num_q), dtype=bool)
    suits = (num_q >= _BLOCK_LEAST_ROWS) & (num_k >= _BLOCK_LEAST_ROWS) & (num_k <= _BLOCK_MOST_KEYS)
    return suits & (num_q <= num_k) if causal else suits


def _row_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """One entry in float32, a block of rows at a time against just the keys that it sees, scores in the cache.

    The query heads of a key/value head are rows of one product, so keys are neither repeated nor copied.
    """
    num_q, num_k, kv_heads, dim = len(q), len(k), k.shape[1], q.shape[2]
    groups, shift = q.shape[1] // kv_heads, len(k) - len(q)
    queries = (q.float() * scale).view(num_q, kv_heads, groups, dim).permute(1, 2, 0, 3)
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    out_heads = out.view(num_q, kv_heads, groups, dim).permute(1, 2, 0, 3)
    step = max(16, min(64, _BLOCK_SCORES // (groups * num_k) // 16 * 16))
    for low in range(0, num_q, step):
        high = min(low + step, num_q)
        first = 0 if window is None else max(0, low + shift - window + 1)
        last = high + shift if causal else num_k
        rows = queries[:, :, low:high].reshape(kv_heads, -1, dim)
        scores = torch.bmm(rows, keys[:, :, first:last])
        if causal:
            mask = _cached_mask(high - low, last - first, window)
            scores.view(kv_heads, groups, high - low, -1)[..., -mask.shape[1] :].add_(mask)
        weights = scores.softmax(-1)
        if lse is not None:
            # The largest weight is exp(largest score - lse): cheaper than exponentials of our own.
            found = scores.amax(-1).sub_(weights.amax(-1).log_()).view(kv_heads, groups, high - low)
            lse[low:high].view(-1, kv_heads, groups).copy_(found.permute(2, 0, 1))
        mixed = torch.bmm(weights, values[:, first:last])
        out_heads[:, :, low:high].copy_(mixed.view(kv_heads, groups, high - low, dim))


@functools.lru_cache(maxsize=512)
def _cached_mask(num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
    """What to add to the scores' last columns; only the last ``num_queries`` of them hide anything without a window."""
    width = num_queries if window is None else num_keys
    seen = visible(num_queries, width, causal=True, window=window, device=torch.device("cpu"))
    assert seen is not None
    return torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)


def _one_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_start: np.ndarray,
    k_start: np.ndarray,
    nq: int,
    nk: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    batch, kv_heads, dim = len(q_start), k.shape[1], q.shape[2]
    groups = q.shape[1] // kv_heads
    q_rows, k_rows = _rows(q_start, nq, q.device), _rows(k_start, nk, k.device)
    # A key/value head and its query heads are one batch entry, so that keys are broadcast, not repeated.
    queries = _by_kv_head(q[q_rows], batch, kv_heads, groups)
    keys, values = (_by_kv_head(t[k_rows], batch, kv_heads, 1).expand(-1, groups, -1, -1) for t in (k, v))
    square = causal and nq == nk and window is None
    mask = None if square else visible(nq, nk, causal=causal, window=window, device=q.device)
    o, m = _dense(queries, keys, values, square, mask, scale)
    o = o.view(batch, kv_heads, groups, nq, dim).permute(0, 3, 1, 2, 4)
    m = m.view(batch, kv_heads, groups, nq).permute(0, 3, 1, 2)
    if isinstance(q_rows, slice):
        out[q_rows].view(1, nq, kv_heads, groups, dim).copy_(o)
        lse[q_rows].view(1, nq, kv_heads, groups).copy_(m)
    else:
        out[q_rows] = o.reshape(-1, kv_heads * groups, dim)
        lse[q_rows] = m.reshape(-1, kv_heads * groups)


def _by_kv_head(rows: torch.Tensor, batch: int, kv_heads: int, groups: int) -> torch.Tensor:
    """Rows [batch n, kv_heads groups, d] as [batch kv_heads, groups, n, d]; a view where the batch is one entry."""
    dim = rows.shape[2]
    split = rows.view(batch, -1, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
    return split[0] if batch == 1 else split.reshape(batch * kv_heads, groups, -1, dim)


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batched [B, H, rows, d] attention: the CPU's flash kernel, or the definition elsewhere."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16):
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        return out, lse
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if is_causal:
        mask = visible(q.shape[-2], k.shape[-2], causal=True, window=None, device=q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def _rows(start: np.ndarray, length: int, device: torch.device) -> torch.Tensor | slice:
    if len(start) == 1:
        return slice(int(start[0]), int(start[0]) + length)
    index = start.astype(np.int64)[:, None] + np.arange(length)
    return torch.from_numpy(index.reshape(-1)).to(device, non_blocking=True)


def _pairs(offsets: np.ndarray) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets.tolist()))
