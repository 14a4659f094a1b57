"""The machine that a memory plan makes of some devices."""

from __future__ import annotations

from typing import Any

from ..blocks import BLOCK_TOKENS
from ..core import ModelSpec
from ..costmodel import Peer
from ..forming import sharing_rule
from ..frontend import Machine, limits_of
from ..machine import MachineProfile
from ..residency import Budget, Pins, ResidencyPlan, plan_residency
from ..residency.speed import PRECISIONS

GIB = 1 << 30
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def plan_machine(
    spec: ModelSpec,
    profile: MachineProfile,
    *,
    ranks: int,
    kv_gib: float,
    device_gib: float,
    host_gib: float,
    sweep_tokens: int,
    bank_dtype: str = "float8_e4m3fn",
    dtype: str = "bfloat16",
) -> Machine:
    """The machine that the memory plan makes of ``ranks`` devices of one host. PlanError: it does not fit."""
    budget = Budget(
        device_bytes=int((device_gib - kv_gib) * GIB), host_bytes=int(host_gib * GIB / ranks), ranks=ranks, kind="cuda"
    )
    plan = plan_residency(spec, budget, dtype=dtype, bank_dtype=bank_dtype, pins=Pins(max_sweep_tokens=sweep_tokens))
    return planned_machine(spec, profile, plan, kv_gib=kv_gib)


def planned_machine(
    spec: ModelSpec,
    profile: MachineProfile,
    plan: ResidencyPlan,
    *,
    kv_gib: float,
    peer: Peer = "copy-engine",
    max_sweep_s: float | None = None,
    max_wait_s: float = 0.0,
) -> Machine:
    """The machine of a residency plan."""
    common: dict[str, Any] = {
        "precision": PRECISIONS[plan.bank_dtype],
        "levels": plan.levels,
        "bank_bytes": plan.bank_bytes,
        "depth": max(1, plan.bank_buffers),
        "ranks": plan.ranks,
        "peer": peer,
        "sweep_tokens": plan.sweep.max_sweep_tokens,
    }
    return Machine(
        spec=spec,
        profile=profile,
        kv_blocks=int(kv_gib * GIB) // block_bytes(spec, plan.dtype),
        limits=limits_of(spec, profile, **common),
        rule=sharing_rule(spec, "auto"),
        max_request_tokens=min(spec.max_positions, plan.longest_request),
        max_sweep_s=max_sweep_s,
        max_wait_s=max_wait_s,
        **common,
    )


def block_bytes(spec: ModelSpec, dtype: str) -> int:
    """K and V of 16 tokens over all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * _ELEMENT_BYTES[dtype] * BLOCK_TOKENS
