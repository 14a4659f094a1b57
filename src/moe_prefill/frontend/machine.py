"""What a worker is to the frontend: a model, rates, a residency plan, a KV pool; real workers and simulated ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..core import ModelSpec
from ..costmodel import RESIDENT, Batch, Streaming, batch_flops, saturation
from ..errors import PlanError
from ..forest import SharingRule
from ..machine import MachineProfile
from .costs import RequestCosts
from .former import SweepBounds
from .frontend import Admission
from .policies import Limits

# What a worker may be given, in full sweeps: the one that runs and enough of the next one. With 1 the sweeps that share
# much end up short (hot-prefix mix: 4% slower), with 2 and more there is less to balance with at the end (low mix: 1%).
_FULL_SWEEPS = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Every worker is one of these. ``streaming`` is that of the residency plan, ``kv_blocks`` the slots of its pool.
    ``limits.saturated`` is T, at least ``t_paper``.
    """

    spec: ModelSpec
    profile: MachineProfile
    precision: str
    streaming: Streaming = RESIDENT
    sweep_tokens: int
    max_request_tokens: int | None = None  # None: the model's context
    kv_blocks: int = 0
    limits: Limits
    rule: SharingRule
    max_sweep_s: float | None = None
    max_wait_s: float = 0.0
    max_queued: int = 1 << 20
    costs: RequestCosts = field(init=False)

    def __post_init__(self) -> None:
        costs = RequestCosts(
            self.spec, self.profile, precision=self.precision, sweep_tokens=self.sweep_tokens, rule=self.rule
        )
        object.__setattr__(self, "costs", costs)

    @classmethod
    def planned(cls, **fields: Any) -> Machine:
        """With the limits that follow from the other fields."""
        machine = cls(limits=Limits(saturated=0, full=0), **fields)
        return replace(machine, limits=limits_of(machine))

    @property
    def bounds(self) -> SweepBounds:
        return SweepBounds(
            rule=self.rule,
            max_tokens=self.sweep_tokens,
            least_flops=self.limits.saturated,
            max_s=self.max_sweep_s,
            max_wait_s=self.max_wait_s,
            kv_blocks=self.kv_blocks,
        )

    @property
    def admission(self) -> Admission:
        longest = self.spec.max_positions if self.max_request_tokens is None else self.max_request_tokens
        return Admission(max_request_tokens=longest, max_queued=self.max_queued)


def limits_of(machine: Machine) -> Limits:
    """T, at least ``t_paper`` and at most a sweep that fills memory, also where no sweep hides its banks; and what a
    worker may have.
    """
    full = full_sweep_flops(machine.spec, machine.sweep_tokens)
    try:
        found = saturation(machine.spec, machine.profile, precision=machine.precision, streaming=machine.streaming)
        saturated = min(full, max(found.flops, found.t_paper))
    except PlanError:
        saturated = full
    return Limits(saturated=saturated, full=int(_FULL_SWEEPS * full))


def full_sweep_flops(spec: ModelSpec, sweep_tokens: int) -> int:
    """Of a sweep of short requests that fills the memory plan."""
    return batch_flops(spec, Batch.uniform(sweep_tokens, min(512, sweep_tokens)))
