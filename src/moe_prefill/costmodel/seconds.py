"""Seconds of each part of a layer: FLOPs at the rate of that size, or bytes at memory speed, whichever is longer."""

from __future__ import annotations

import numpy as np

from ..core import ModelSpec
from ..machine import MachineProfile
from .batch import Batch, Rows
from .flops import carried_rows, layer_flops
from .work import Part, Work, head_work, layer_work


def layer_seconds(
    spec: ModelSpec, index: int, batch: Batch, profile: MachineProfile, precision: str
) -> dict[Part, float]:
    """Seconds of every part of layer ``index``; what its launches add is counted with ``elementwise``.

    UsageError: the profile has no rates for ``precision``.
    """
    work, carried = layer_work(spec, index, batch, precision), carried_rows(spec, index, batch)
    rows = min(carried.num_rows, profile.chunk_rows)
    gemm = profile.rates("gemm", precision)
    seconds: dict[Part, float] = {
        part: _roofline(work[part], gemm.at(max(1, rows)), profile) for part in ("out", "router", "dense")
    }
    tokens = min(batch.num_tokens, profile.chunk_rows)
    flops = layer_flops(spec, index)  # keys and values of all tokens, queries of those that are carried
    qkv_s = flops.keys_values * batch.num_tokens / gemm.at(tokens)
    qkv_s += flops.queries * carried.num_rows / gemm.at(max(1, rows))
    seconds["qkv"] = max(qkv_s, work["qkv"].bytes / profile.memory_bandwidth)
    grouped = profile.rates("grouped", precision).at(max(1, rows) * spec.top_k / spec.num_experts)
    seconds["experts"] = _roofline(work["experts"], grouped, profile)
    seconds["attention"] = _attention_seconds(spec, index, carried, profile, precision, work["attention"])
    seconds["elementwise"] = work["elementwise"].bytes / profile.rates("elementwise", precision).at(tokens)
    busy_s = sum(seconds.values())
    seconds["elementwise"] += profile.layer_s(busy_s) - busy_s
    return seconds


def head_seconds(spec: ModelSpec, batch: Batch, profile: MachineProfile, precision: str) -> float:
    """Reading the LM head."""
    rate = profile.rates("gemm", precision).at(max(1, batch.asked_rows))
    return _roofline(head_work(spec, batch, precision), rate, profile)


def _attention_seconds(
    spec: ModelSpec, index: int, rows: Rows, profile: MachineProfile, precision: str, work: Work
) -> float:
    """Each run at the rate of the causal sequence whose rows see as many keys on average."""
    pairs = rows.pairs(spec.layers[index].window)
    if not len(pairs):
        return 0.0
    alike = 2.0 * pairs / rows.length - 1.0
    rates = profile.rates("attention", precision).at(np.maximum(alike, 1.0))
    flops = layer_flops(spec, index).attention_pair * (pairs * rows.count).astype(np.float64)
    return max(float((flops / rates).sum()), work.bytes / profile.memory_bandwidth)


def _roofline(work: Work, rate: float, profile: MachineProfile) -> float:
    return max(work.flops / rate, work.bytes / profile.memory_bandwidth)
