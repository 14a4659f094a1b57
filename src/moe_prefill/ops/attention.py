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
from .masks import visible

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
    return _by_shape(q_QHd, k_KGd, v_KGd, spans, causal=causal, window=window, scale=scale)


def _by_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Spans,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of equal shape share batched calls; on a CPU large ones have calls of their own."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    shapes = np.diff(spans.cu_q).astype(np.int64) << 32 | np.diff(spans.cu_k)
    for shape in np.unique(shapes):
        q_start, k_start = spans.cu_q[:-1][shapes == shape], spans.cu_k[:-1][shapes == shape]
        nq, nk = int(shape >> 32), int(shape & 0xFFFFFFFF)
        if nq == 0 or nk == 0:
            continue
        attend_: cpu_attention.Attention = _equal_entries_
        most = max(1, _MAX_BATCHED_SCORES // (nq * nk))
        if cpu_attention.suits(q, nq, nk, causal):
            attend_, most = cpu_attention.attention_for(q.shape[1], nq, nk)
        for low in range(0, len(q_start), most):
            q_rows = _rows(q_start[low : low + most], nq, q.device)
            k_rows = _rows(k_start[low : low + most], nk, k.device)
            batch = [t[rows] for t, rows in ((q, q_rows), (k, k_rows), (v, k_rows), (out, q_rows), (lse, q_rows))]
            entries = [t.view(-1, n, *t.shape[1:]) for t, n in zip(batch, (nq, nk, nk, nq, nq), strict=True)]
            attend_(*entries, causal=causal, window=window, scale=scale)
            if not isinstance(q_rows, slice):
                out[q_rows], lse[q_rows] = batch[3:]
    return out, lse


def _equal_entries_(
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
    """torch's flash kernel for CPUs, or the definition elsewhere. The query heads of a key/value head meet keys that
    are broadcast, not repeated.
    """
    batch, num_q, heads, dim = q_BnHd.shape
    num_k, kv_heads = k_BKGd.shape[1:3]
    q, out = (t.view(batch, num_q, kv_heads, -1, dim).permute(0, 2, 3, 1, 4) for t in (q_BnHd, out_BnHd))
    k, v = (
        t.transpose(1, 2).flatten(0, 1).unsqueeze(1).expand(-1, heads // kv_heads, -1, -1) for t in (k_BKGd, v_BKGd)
    )
    square = causal and num_q == num_k and window is None
    mask = None if square else visible(num_q, num_k, causal=causal, window=window, device=q.device)
    found, lse = _dense(q.flatten(0, 1), k, v, square, mask, scale)
    out.copy_(found.view(out.shape))
    lse_BnH.view(batch, num_q, kv_heads, -1).permute(0, 2, 3, 1).copy_(lse.view(out.shape[:-1]))


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
