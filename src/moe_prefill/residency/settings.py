"""The plan that an engine's settings ask for: one way for the engine and for ``moe-prefill plan``."""

from __future__ import annotations

from dataclasses import replace

from ..config import EngineConfig
from ..core import ModelSpec
from ..machine import MachineProfile
from .plan import Budget, Pins, ResidencyPlan
from .planner import plan_residency
from .prefixes import plan_with_prefixes
from .speed import PRECISIONS, predicted_speed, predictions

TOKENS_PER_REQUEST = 1024  # that a plan is optimised for, where nothing is known of the requests


def bank_dtype(config: EngineConfig, spec: ModelSpec, dtype: str) -> str:
    """How experts are stored, and with float8 also the linear maps; everything else is in ``dtype``."""
    return "float8_e4m3fn" if config.quantization == "fp8" or spec.float8_blocks else dtype


def plan_for(
    config: EngineConfig,
    spec: ModelSpec,
    budget: Budget,
    *,
    dtype: str,
    profile: MachineProfile | None = None,
    tokens_per_request: int = TOKENS_PER_REQUEST,
) -> ResidencyPlan:
    """What each rank holds; ``dtype`` is that of everything but the experts. A measured ``profile`` decides between
    banks and tokens; without one, or with an estimated one, the rule does. Any profile that knows the rates says
    whether a remedy against exposed banks is worth its memory. Raises UsageError and PlanError.
    """
    stored = bank_dtype(config, spec, dtype)
    is_measured = profile is not None and not profile.is_estimated
    pins = Pins(
        residency=config.residency,
        max_sweep_tokens=config.max_sweep_tokens,
        chunk_rows=config.chunk_rows,
        prefetch_depth=config.prefetch_depth,
        usual_chunk_rows=profile.chunk_rows if profile is not None and is_measured else None,
    )
    predict = None
    if profile is not None:
        predict = predictions(
            spec,
            profile,
            bank_dtype=stored,
            ranks=budget.ranks,
            tokens_per_request=tokens_per_request,
            transfer=config.transport,
        )
    speed = predicted_speed(predict, config.prefetch_depth) if predict is not None and is_measured else None
    if profile is not None and not _knows(profile, PRECISIONS[stored], config.transport if budget.ranks > 1 else None):
        predict = None

    def plan(kv_blocks: int) -> ResidencyPlan:
        mine = replace(pins, kv_blocks=kv_blocks)
        return plan_residency(spec, budget, dtype=dtype, bank_dtype=stored, pins=mine, speed=speed, predict=predict)

    return plan_with_prefixes(config, spec, budget, dtype, plan)


def _knows(profile: MachineProfile, precision: str, transport: str | None) -> bool:
    """Whether sweeps can be predicted wherever banks live: cards without float8 units or links between them lack a
    rate.
    """
    return precision in profile.grouped and {"host", transport or "host"} <= set(profile.transfers)
