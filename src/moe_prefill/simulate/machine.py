"""What a simulated worker is: a model, rates, a residency plan, a KV pool."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..blocks import BLOCK_TOKENS
from ..core import ModelSpec
from ..costmodel import Batch, Level, batch_flops, saturation
from ..forest import SharingRule
from ..forming import sharing_rule
from ..frontend import Admission, Limits, RequestCosts, SweepBounds
from ..machine import MachineProfile
from ..residency import Budget, Pins, plan_residency

GIB = 1 << 30
_PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "float8_e4m3fn": "float8"}
# What a worker may be given, in full sweeps: the one that runs and enough of the next one. With 1 the sweeps that share
# much end up short (hot-prefix mix: 4% slower), with 2 and more there is less to balance with at the end (low mix: 1%).
_FULL_SWEEPS = 1.5
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Every worker of a simulation is one of these. ``levels``, ``bank_bytes``, ``depth`` and ``ranks`` are those of
    the residency plan; ``kv_blocks`` the slots of its pool. ``limits.saturated`` is T, at least ``t_paper``.
    """

    spec: ModelSpec
    profile: MachineProfile
    precision: str
    levels: tuple[Level | None, ...] = ()
    bank_bytes: int = 0
    depth: int = 1
    ranks: int = 1
    sweep_tokens: int
    kv_blocks: int
    limits: Limits
    rule: SharingRule
    max_sweep_s: float | None = None
    max_wait_s: float = 0.0
    max_queued: int = 1 << 20
    costs: RequestCosts = field(init=False)

    def __post_init__(self) -> None:
        costs = RequestCosts(self.spec, self.profile, precision=self.precision, sweep_tokens=self.sweep_tokens)
        object.__setattr__(self, "costs", costs)

    @property
    def bounds(self) -> SweepBounds:
        return SweepBounds(
            rule=self.rule,
            max_tokens=self.sweep_tokens,
            least_flops=self.limits.saturated,
            max_s=self.max_sweep_s,
            max_wait_s=self.max_wait_s,
        )

    @property
    def admission(self) -> Admission:
        return Admission(max_request_tokens=self.spec.max_positions, max_queued=self.max_queued)


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
    precision, depth = _PRECISIONS[bank_dtype], max(1, plan.bank_buffers)
    threshold = saturation(
        spec,
        profile,
        precision=precision,
        levels=plan.levels,
        bank_bytes=plan.bank_bytes,
        depth=depth,
        ranks=ranks,
    )
    full = int(_FULL_SWEEPS * batch_flops(spec, Batch.uniform(sweep_tokens, 512)))
    return Machine(
        spec=spec,
        profile=profile,
        precision=precision,
        levels=plan.levels,
        bank_bytes=plan.bank_bytes,
        depth=depth,
        ranks=ranks,
        sweep_tokens=sweep_tokens,
        kv_blocks=int(kv_gib * GIB) // block_bytes(spec, dtype),
        limits=Limits(saturated=max(threshold.flops, threshold.t_paper), full=full),
        rule=sharing_rule(spec, "auto"),
    )


def block_bytes(spec: ModelSpec, dtype: str) -> int:
    """K and V of 16 tokens over all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * _ELEMENT_BYTES[dtype] * BLOCK_TOKENS
