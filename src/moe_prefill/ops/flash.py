"""Flash attention kernels for packed rows on CUDA, and which of them runs. Same terms as ``attention``.

FlashAttention 3 (package ``fa3-fwd``) is the faster one on Hopper; FlashAttention 2 comes with torch and is always
there. ``MOE_PREFILL_ATTENTION`` names the kernel to use where the choice is to be forced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import choice

if TYPE_CHECKING:
    from .attention import Spans

Result = tuple[torch.Tensor, torch.Tensor]
VARIABLE = "MOE_PREFILL_ATTENTION"
# FlashAttention 3 computes tiles of 128 rows of queries. On one H200 a tile takes as long as its keys and some 64 more,
# and as 32 more again where it holds all heads of a key/value head (benchmarks/results/attention_packing.json).
_TILE, _TILE_KEYS, _PACKING_KEYS = 128, 64, 32


@dataclass(frozen=True, slots=True)
class FlashKernel:
    """``run(q, k, v, spans, causal, window, scale)`` gives output [Q, H, d] and log-sum-exp [H, Q] as the kernel has
    it. ``refusal(device, windowed)`` says why it cannot run, or None.
    """

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Spans, bool, int | None, float], Result]
    refusal: Callable[[torch.device, bool], str | None]


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Spans,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    need_lse: bool,
) -> Result:
    """One launch, no synchronisation; the log-sum-exp as ``attention`` has it, [Q, H]."""
    out, lse = chosen(q.device, windowed=window is not None).run(q, k, v, spans, causal, window, scale)
    if need_lse:
        lse = torch.where(torch.isinf(lse), -torch.inf, lse)  # kernels give +inf for a query without keys
    return out, lse.t()


def is_legal(q: torch.Tensor) -> bool:
    """Whether any flash kernel takes these queries."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


@functools.cache
def chosen(device: torch.device, *, windowed: bool = False) -> FlashKernel:
    """The kernel for such queries there; see ``choice.choose``."""
    return choice.choose(KERNELS, lambda kernel: kernel.refusal(device, windowed), VARIABLE)


def explain(device: torch.device, *, windowed: bool = False) -> list[str]:
    """A line for each kernel: chosen, possible, or why not."""
    return choice.explain(KERNELS, lambda kernel: kernel.refusal(device, windowed), VARIABLE)


def flash_3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Spans,
    causal: bool,
    window: int | None,
    scale: float,
    pack: bool | None = None,
) -> Result:
    """FlashAttention 3. ``pack``: whether a tile holds all heads of a key/value head; None: ``packs_heads`` says."""
    if pack is None:
        pack = packs_heads(np.diff(spans.cu_q), np.diff(spans.cu_k), q.shape[1] // k.shape[1], causal=causal)
    nothing = [None] * 9  # page table to scales of float8 inputs
    out, lse, *_ = torch.ops.fa3_fwd.fwd(
        *(q, k, v, None, None, None, None),
        *(spans.cu_q_device, spans.cu_k_device, None, None, None, spans.max_q, spans.max_k),
        *nothing,
        *(scale, causal, -1 if window is None else window - 1, 0 if causal else -1),
        *(0, 0.0, True, None),  # no chunks, no soft cap
        1,  # one split: its number would change the order of sums
        pack,
        0,
    )
    return out, lse


def packs_heads(num_q: np.ndarray, num_k: np.ndarray, heads: int, *, causal: bool) -> bool:
    """Whether tiles of queries better hold all ``heads`` of a key/value head: fewer are partly empty then, and each
    takes longer. Entries have ``num_q`` queries and ``num_k`` keys. FlashAttention 3 itself always packs where lengths
    vary, since it has them on the device only; the answers are the same.
    """
    keys = num_k - 0.5 * num_q if causal else num_k  # that a query sees on average

    def cost(rows: np.ndarray, more_keys: int) -> float:
        return float((-(-rows // _TILE) * (keys + _TILE_KEYS + more_keys)).sum())

    return heads * cost(num_q, 0) > cost(heads * num_q.astype(np.int64), _PACKING_KEYS)


def _refusal_3(device: torch.device, windowed: bool) -> str | None:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU"
    if windowed:
        return "its build has no sliding windows"
    if importlib.util.find_spec("fa3_fwd") is None:
        return "not installed (pip install fa3-fwd)"
    importlib.import_module("fa3_fwd._C")  # registers the operator
    return None


def _flash_2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, causal: bool, window: int | None, scale: float
) -> Result:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        spans.cu_q_device,
        spans.cu_k_device,
        spans.max_q,
        spans.max_k,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=0 if window is not None else None,
    )
    return out, lse


KERNELS = (
    FlashKernel("flash-attention-3", flash_3, _refusal_3),
    FlashKernel("flash-attention-2", _flash_2, lambda device, windowed: None),
)
