"""``moe-prefill plan``: what a model needs on given GPUs, how large its sweeps can be, and what to expect of them; from
shapes alone, without a GPU and without weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer

from ..config import EngineConfig
from ..core import ModelSpec
from ..costmodel import Saturation, SweepPrediction, saturation
from ..errors import PlanError, UsageError
from ..machine import MachineProfile, estimated_profile, load_profile
from ..memory import GIB
from ..models import preset, preset_names, spec_from_hf
from ..residency import TOKENS_PER_REQUEST, Budget, ResidencyPlan, plan_for, predicted_sweep
from ..residency.speed import PRECISIONS, with_chunks

_UNBOUNDED = 1 << 60  # bytes of host memory where no limit is given
_STORED = {"float16": "bfloat16"}  # what the published type is computed in


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is planned for. ``gpu``: whose datasheet speed is estimated from where the settings name no profile."""

    config: EngineConfig
    gpu: str
    tokens_per_request: int
    json: bool

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


def plan(
    model: Annotated[str, typer.Option("--model", "-m", help="A preset's name, a model directory or a hub id.")],
    hbm_gib: Annotated[float, typer.Option("--hbm-gib", help="Memory to use of each GPU.")],
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs of one host.")] = 1,
    host_gib: Annotated[float | None, typer.Option("--host-gib", help="Host memory; default: no limit.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of a hub model.")] = None,
    strategy: Annotated[str, typer.Option("--strategy", help="asyncep, or one to compare with.")] = "asyncep",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str | None, typer.Option("--quantization", help="fp8: 8-bit experts.")] = None,
    num_layers: Annotated[int | None, typer.Option("--num-layers", help="Plan for this depth.")] = None,
    residency: Annotated[str | None, typer.Option("--residency", help="As of the task commands.")] = None,
    max_sweep_tokens: Annotated[int | None, typer.Option("--max-sweep-tokens", help="Tokens of one sweep.")] = None,
    chunk_rows: Annotated[int | None, typer.Option("--chunk-rows", help="Rows of a layer at a time.")] = None,
    prefetch_depth: Annotated[int | None, typer.Option("--prefetch-depth", help="Banks that fill ahead.")] = None,
    transport: Annotated[str, typer.Option("--transport", help="copy-engine or nccl.")] = "copy-engine",
    kv_gib: Annotated[float | None, typer.Option("--kv-gib", help="Memory that keeps prefixes.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="FILE", help="Rates that moe-prefill calibrate measured.")
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="Without a profile: estimate from this GPU's datasheet.")] = "H200",
    tokens_per_request: Annotated[
        int, typer.Option("--tokens-per-request", help="For the prediction.")
    ] = TOKENS_PER_REQUEST,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Memory, residency, sweep size and predicted speed of a model on given GPUs; needs neither GPU nor weights."""
    config = EngineConfig(
        model=model,
        revision=revision,
        memory_gib=hbm_gib,
        gpus=gpus,
        host_gib=host_gib,
        strategy=strategy,  # type: ignore[arg-type]  # checked by the config
        dtype=dtype,
        quantization=quantization,  # type: ignore[arg-type]  # checked by the config
        num_layers=num_layers,
        residency=residency,
        max_sweep_tokens=max_sweep_tokens,
        chunk_rows=chunk_rows,
        prefetch_depth=prefetch_depth,
        kv_gib=kv_gib,
        profile=profile,
        transport=transport,  # type: ignore[arg-type]  # checked by the config
    )
    options = PlanOptions(
        config=config,
        gpu=gpu,
        tokens_per_request=tokens_per_request,
        json=as_json,
    )
    show_plan(options)


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
    host = _UNBOUNDED if config.host_gib is None else int(config.host_gib * GIB)
    return Budget(
        device_bytes=int(config.memory_gib * GIB), host_bytes=host // options.ranks, ranks=options.ranks, kind="cuda"
    )


def computed_dtype(config: EngineConfig, spec: ModelSpec) -> str:
    """The type of everything but the experts."""
    return _STORED.get(spec.dtype, spec.dtype) if config.dtype == "auto" else config.dtype


def _forecast(options: PlanOptions, spec: ModelSpec, plan: ResidencyPlan, profile: MachineProfile) -> Forecast:
    common: dict[str, Any] = {"ranks": plan.ranks, "tokens_per_request": options.tokens_per_request}
    common["transfer"] = options.config.transport
    tokens, rows = plan.sweep.max_sweep_tokens, plan.sweep.chunk_rows
    sweep = predicted_sweep(
        spec, profile, plan.levels, tokens, rows, bank_dtype=plan.bank_dtype, buffers=plan.bank_buffers, **common
    )
    found, why = None, None
    try:
        found = saturation(
            spec,
            with_chunks(profile, rows),
            precision=PRECISIONS[plan.bank_dtype],
            levels=plan.levels,
            bank_bytes=plan.bank_bytes,
            depth=max(1, plan.bank_buffers),
            **common,
        )
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
