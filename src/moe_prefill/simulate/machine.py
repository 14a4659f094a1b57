"""The machine that a memory plan makes of some devices."""

from __future__ import annotations

from ..config import Sharing
from ..core import ModelSpec
from ..costmodel import Peer
from ..forming import sharing_rule
from ..frontend import Machine
from ..machine import MachineProfile
from ..memory import GIB, kv_block_bytes
from ..residency import Budget, Pins, ResidencyPlan, plan_residency
from ..residency.record import DTYPE_BYTES
from ..residency.speed import PRECISIONS


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
        device_bytes=int(device_gib * GIB), host_bytes=int(host_gib * GIB / ranks), ranks=ranks, kind="cuda"
    )
    pins = Pins(max_sweep_tokens=sweep_tokens, kv_blocks=int(kv_gib * GIB) // kv_block_bytes(spec, DTYPE_BYTES[dtype]))
    return planned_machine(spec, profile, plan_residency(spec, budget, dtype=dtype, bank_dtype=bank_dtype, pins=pins))


def planned_machine(
    spec: ModelSpec,
    profile: MachineProfile,
    plan: ResidencyPlan,
    *,
    peer: Peer = "copy-engine",
    sharing: Sharing = "auto",
    max_sweep_s: float | None = None,
    max_wait_s: float = 0.0,
) -> Machine:
    """The machine of a residency plan."""
    return Machine.planned(
        spec=spec,
        profile=profile,
        precision=PRECISIONS[plan.bank_dtype],
        streaming=plan.streaming(peer),
        sweep_tokens=plan.sweep.max_sweep_tokens,
        max_request_tokens=min(spec.max_positions, plan.longest_request),
        kv_blocks=plan.kv_blocks,
        rule=sharing_rule(spec, sharing),
        max_sweep_s=max_sweep_s,
        max_wait_s=max_wait_s,
    )
