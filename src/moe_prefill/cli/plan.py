"""``moe-prefill plan``: what a model needs on given GPUs, how large its sweeps can be, and what to expect of them; from
shapes alone, without a GPU and without weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import EngineConfig
from ..core import ModelSpec
from ..costmodel import Batch, Saturation, SweepPrediction, predict_sweep, saturation
from ..errors import PlanError, UsageError
from ..machine import MachineProfile, estimated_profile, load_profile
from ..memory import GIB
from ..models import preset, preset_names, spec_from_hf
from ..residency import TOKENS_PER_REQUEST, UNBOUNDED, Budget, ResidencyPlan, plan_for
from ..residency.speed import PRECISIONS, with_chunks
from .fields import given

_STORED = {"float16": "bfloat16"}  # what the published type is computed in


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is planned for. ``gpu``: whose datasheet speed is estimated from where the settings name no profile."""

    config: EngineConfig
    gpu: str = "H200"
    tokens_per_request: int = TOKENS_PER_REQUEST
    json: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        if self.tokens_per_request < 1:
            raise UsageError(f"--tokens-per-request is {self.tokens_per_request}; it must be at least 1")

    @property
    def ranks(self) -> int:
        return self.config.gpus or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a profile says of a plan; ``unsaturated`` says why there is no T."""

    profile: MachineProfile
    sweep: SweepPrediction
    saturation: Saturation | None
    unsaturated: str | None


def plan(**values: Any) -> None:
    """Memory, residency, sweep size and predicted speed of a model on given GPUs; needs neither GPU nor weights."""
    for name, flag, what in (
        ("model", "--model", "a preset's name, a directory or a hub id"),
        ("memory_gib", "--hbm-gib", "the memory to use of each GPU"),
    ):
        if values[name] is None:
            raise UsageError(f"{flag} is needed: {what}")
    show_plan(PlanOptions(config=EngineConfig(**given(values, EngineConfig)), **given(values, PlanOptions)))


def show_plan(options: PlanOptions) -> None:
    """Print the plan, as tables or as JSON. Raises UsageError, ModelError and PlanError, as the engine would."""
    spec = planned_spec(options.config)
    if options.config.strategy != "asyncep":
        from .plan_share import show_share

        show_share(options, spec)
        return
    plan, forecast = make_plan(options, spec)
    if options.json:
        print(json.dumps(plan_fields(options, plan, forecast)))
        return
    from .plan_view import show_asyncep

    show_asyncep(options, spec, plan, forecast)


def planned_spec(config: EngineConfig) -> ModelSpec:
    """The spec of a preset, or of a model's config file."""
    if config.model.rpartition("/")[2].casefold() in {name.casefold() for name in preset_names()}:
        raw: Mapping[str, Any] = preset(config.model)
    else:
        from ..checkpoint import read_config, resolve_directory

        raw = read_config(resolve_directory(config.model, revision=config.revision, weights=False))
    spec = spec_from_hf(raw)
    return replace(spec, layers=spec.layers[: config.num_layers or spec.num_layers])


def make_plan(options: PlanOptions, spec: ModelSpec) -> tuple[ResidencyPlan, Forecast]:
    """The plan that an engine with these settings would make, and its forecast."""
    config = options.config
    profile = estimated_profile(options.gpu) if config.profile is None else load_profile(config.profile)
    plan = plan_for(
        config,
        spec,
        device_budget(options),
        dtype=computed_dtype(config, spec),
        profile=profile,
        tokens_per_request=options.tokens_per_request,
    )
    return plan, _forecast(options, spec, plan, profile)


def device_budget(options: PlanOptions) -> Budget:
    """Each rank's memory, from the settings alone."""
    config = options.config
    assert config.memory_gib is not None
    host = UNBOUNDED if config.host_gib is None else int(config.host_gib * GIB)
    return Budget(
        device_bytes=int(config.memory_gib * GIB), host_bytes=host // options.ranks, ranks=options.ranks, kind="cuda"
    )


def computed_dtype(config: EngineConfig, spec: ModelSpec) -> str:
    """The type of everything but the experts."""
    return _STORED.get(spec.dtype, spec.dtype) if config.dtype == "auto" else config.dtype


def _forecast(options: PlanOptions, spec: ModelSpec, plan: ResidencyPlan, profile: MachineProfile) -> Forecast:
    machine, per_request = with_chunks(profile, plan.sweep.chunk_rows), options.tokens_per_request
    precision, streaming = PRECISIONS[plan.bank_dtype], plan.streaming(options.config.transport)
    batch = Batch.uniform(plan.sweep.max_sweep_tokens, per_request)
    sweep = predict_sweep(spec, batch, machine, precision=precision, streaming=streaming)
    found, why = None, None
    try:
        found = saturation(spec, machine, precision=precision, streaming=streaming, tokens_per_request=per_request)
    except PlanError as error:
        why = str(error)
    return Forecast(profile=profile, sweep=sweep, saturation=found, unsaturated=why)


def plan_fields(options: PlanOptions, plan: ResidencyPlan, forecast: Forecast) -> dict[str, Any]:
    """Everything that is printed, for programs; sizes in bytes, times in seconds, of one rank."""
    tokens, t = plan.sweep.max_sweep_tokens, forecast.saturation
    return {
        "model": options.config.model,
        "strategy": options.config.strategy,
        "gpus": plan.ranks,
        "dtype": plan.dtype,
        "bank_dtype": plan.bank_dtype,
        "residency": plan.map,
        "prefetch_depth": plan.prefetch_depth,
        "bank_buffers": plan.bank_buffers,
        "staged_shards": plan.staged_shards,
        "remedy": plan.remedy,
        "device_bytes": dict(plan.device_bytes),
        "peak_device_bytes": plan.peak_device_bytes,
        "host_bytes": dict(plan.host_bytes),
        "peak_host_bytes": plan.peak_host_bytes,
        "sweep_tokens": tokens,
        "chunk_rows": plan.sweep.chunk_rows,
        "kv_blocks": plan.kv_blocks,
        "longest_request": plan.longest_request,
        "largest_sweep_tokens": plan.largest_sweep_tokens,
        "largest_streamed_tokens": plan.largest_streamed_tokens,
        "profile": {"gpu": forecast.profile.gpu, "estimated": forecast.profile.is_estimated},
        "tokens_per_request": options.tokens_per_request,
        "sweep_s": forecast.sweep.sweep_s,
        "compute_s": forecast.sweep.compute_s,
        "exposed_s": forecast.sweep.exposed_s,
        "exposed_first_s": forecast.sweep.exposed_first_s,
        "tokens_per_s": tokens / forecast.sweep.sweep_s,
        "saturation": None if t is None else asdict(t),
    }
