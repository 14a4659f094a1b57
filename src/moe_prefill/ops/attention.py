"""Packed variable-length attention with log-sum-exp out.

Q query rows, K key rows, H query heads, G key/value heads, d channels, N entries. At this boundary log-sum-exp is
float32, natural logarithm, [Q, H]; a query without keys gives (0, -inf).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from . import cpu_attention
from .flash import flash, is_legal

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
    need_lse: bool | np.ndarray = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Q, H, d] in the dtype of ``q`` and log-sum-exp float32 [Q, H]; every query belongs to one entry.

    ``causal`` aligns queries and keys at the end; ``window`` (needs causal) is how many keys a query sees, itself
    included. ``need_lse`` may say so for each entry: the log-sum-exp of others is the true one or zero, which merges
    with (0, -inf) alike. Where nobody needs it, it may be left unset, or be +inf for queries without keys.
    """
    assert q_QHd.shape[1] % k_KGd.shape[1] == 0, (q_QHd.shape, k_KGd.shape)
    assert window is None or causal, "a window needs causal order"
    if is_legal(q_QHd):
        any_lse = bool(np.any(need_lse))
        return flash(q_QHd, k_KGd, v_KGd, spans, causal=causal, window=window, scale=scale, need_lse=any_lse)
    return _by_shape(q_QHd, k_KGd, v_KGd, spans, causal, window, scale, np.broadcast_to(need_lse, len(spans.cu_q) - 1))


def _by_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Spans,
    causal: bool,
    window: int | None,
    scale: float,
    need_lse: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of equal shape share batched calls; on a CPU large ones are computed one by one."""
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    num_q, num_k = np.diff(spans.cu_q), np.diff(spans.cu_k)
    products = _suits_products(q, num_q, num_k, causal)
    large = products & (np.minimum(num_q, num_k) >= cpu_attention.LEAST_ROWS)
    if large.any():
        q_spans, k_spans = (list(itertools.compress(_pairs(cu), large)) for cu in (spans.cu_q, spans.cu_k))
        needed = need_lse[large].tolist()
        cpu_attention.large_entries_(q, k, v, out, lse, q_spans, k_spans, needed, causal, window or 0, scale)
    shapes = np.where(large, 0, num_q.astype(np.int64) << 32 | num_k)
    for shape in np.unique(shapes):
        entries = np.flatnonzero(shapes == shape)
        nq, nk = int(shape >> 32), int(shape & 0xFFFFFFFF)
        if nq == 0 or nk == 0:
            continue
        small = bool(products[entries[0]])
        most = cpu_attention.entries_at_once(q.shape[1], nq, nk) if small else _MAX_BATCHED_SCORES // (nq * nk)
        for part in np.array_split(entries, -(-len(entries) // max(1, most))):
            q_rows, k_rows = _rows(spans.cu_q[part], nq, q.device), _rows(spans.cu_k[part], nk, k.device)
            queries = q[q_rows].view(-1, nq, *q.shape[1:])
            keys, values = (t[k_rows].view(-1, nk, *k.shape[1:]) for t in (k, v))
            equal_entries = cpu_attention.equal_entries if small else _equal_entries
            out[q_rows], lse[q_rows] = equal_entries(queries, keys, values, causal, window or 0, scale)
    return out, lse


def _suits_products(q: torch.Tensor, num_q: np.ndarray, num_k: np.ndarray, causal: bool) -> np.ndarray:
    """Which entries are for ``cpu_attention``. A row without keys is another's affair."""
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16):
        return np.zeros(len(num_q), bool)
    few: np.ndarray = num_k <= cpu_attention.MOST_KEYS
    return few & (num_q <= num_k) if causal else few


def _equal_entries(
    q_BnHd: torch.Tensor, k_BKGd: torch.Tensor, v_BKGd: torch.Tensor, causal: bool, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cpu_attention.equal_entries`` by torch's flash kernel for CPUs, or by the definition elsewhere. The query heads
    of a key/value head meet keys that are broadcast, not repeated.
    """
    batch, num_q, heads, dim = q_BnHd.shape
    num_k, kv_heads = k_BKGd.shape[1:3]
    q = q_BnHd.view(batch, num_q, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k, v = (
        t.transpose(1, 2).flatten(0, 1).unsqueeze(1).expand(-1, heads // kv_heads, -1, -1) for t in (k_BKGd, v_BKGd)
    )
    square = causal and num_q == num_k and not window
    mask = None if square else visible(num_q, num_k, causal=causal, window=window or None, device=q.device)
    out, lse = _dense(q, k, v, square, mask, scale)
    out = out.view(batch, kv_heads, -1, num_q, dim).permute(0, 3, 1, 2, 4).reshape(batch * num_q, heads, dim)
    return out, lse.view(batch, kv_heads, -1, num_q).permute(0, 3, 1, 2).reshape(batch * num_q, heads)


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
