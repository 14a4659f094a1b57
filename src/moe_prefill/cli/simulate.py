"""``moe-prefill simulate``: routing policies in virtual time, for a model and machines that need not be there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..blocks import BlockHasher
from ..config import EngineConfig
from ..core import ModelSpec
from ..errors import InputError, UsageError
from ..frontend import POLICIES, Machine, Ticket, make_policy, make_ticket
from ..machine import MachineProfile, estimated_profile, load_profile
from ..residency import plan_for
from ..simulate import Outcome, oracle_saved_tokens, planned_machine, simulate
from ..workloads import MIXES, Workload, make_workload, read_trace
from .plan import PlanOptions, computed_dtype, device_budget, planned_spec

_HOST_GPUS = 8  # a host's, which share the banks; more workers are more hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One policy's run: tokens/s and FLOPs of all workers, latencies in seconds; ``oracle_fraction`` is what one
    infinite cache of whole blocks would save in the order of arrival.
    """

    policy: str
    tokens_per_s: float
    requests_per_s: float
    saved_fraction: float
    oracle_fraction: float
    imbalance: float | None
    makespan_s: float
    sweeps: int
    refused: int
    latency_p50_s: float
    latency_p99_s: float

    @classmethod
    def of(cls, policy: str, outcome: Outcome, oracle_fraction: float) -> Result:
        return cls(
            policy=policy,
            tokens_per_s=outcome.tokens_per_s,
            requests_per_s=len(outcome.order) / outcome.makespan_s,
            saved_fraction=outcome.saved_fraction,
            oracle_fraction=oracle_fraction,
            imbalance=outcome.imbalance if min(outcome.busy_s) else None,  # a worker had nothing
            makespan_s=outcome.makespan_s,
            sweeps=outcome.sweeps,
            refused=outcome.refused,
            latency_p50_s=outcome.latency_quantile_s(0.5),
            latency_p99_s=outcome.latency_quantile_s(0.99),
        )


def simulate_command(
    model: Annotated[str, typer.Option("--model", "-m", help="A preset's name, a model directory or a hub id.")],
    hbm_gib: Annotated[float, typer.Option("--hbm-gib", help="Memory to use of each GPU.")],
    workers: Annotated[int, typer.Option("--workers", min=1, help="GPUs; more than 8 are several hosts.")] = 8,
    mix: Annotated[str, typer.Option("--mix", help=f"Workload: {', '.join(MIXES)}.")] = "aggregated",
    trace: Annotated[
        str | None, typer.Option("--trace", metavar="FILE.jsonl", help="Instead: a trace in Mooncake's format.")
    ] = None,
    scale: Annotated[float, typer.Option("--scale", min=0.0, help="Part of the mix's requests.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="Of the mix.")] = 0,
    policies: Annotated[str, typer.Option("--policies", help="Separated by commas, or all.")] = "ours,round-robin",
    kv_gib: Annotated[float | None, typer.Option("--kv-gib", help="Memory that keeps prefixes.")] = None,
    host_gib: Annotated[float | None, typer.Option("--host-gib", help="Host memory; default: no limit.")] = None,
    max_positions: Annotated[int | None, typer.Option("--max-positions", help="Context, if not the model's.")] = None,
    max_sweep_tokens: Annotated[int | None, typer.Option("--max-sweep-tokens", help="Tokens of one sweep.")] = None,
    max_sweep_s: Annotated[float | None, typer.Option("--max-sweep-s", help="Seconds of one sweep.")] = None,
    max_wait_ms: Annotated[float, typer.Option("--max-wait-ms", help="A sweep below T waits so long.")] = 0.0,
    quantization: Annotated[str | None, typer.Option("--quantization", help="fp8: 8-bit experts.")] = None,
    residency: Annotated[str | None, typer.Option("--residency", help="As of the task commands.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="FILE", help="Rates that moe-prefill calibrate measured.")
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="Without a profile: estimate from this GPU's datasheet.")] = "H200",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Routing policies on a workload in virtual time: the real router over workers that take predicted time."""
    config = EngineConfig(
        model=model,
        memory_gib=hbm_gib,
        gpus=min(workers, _HOST_GPUS),
        host_gib=host_gib,
        kv_gib=kv_gib,
        keep_prefixes=True,
        quantization=quantization,  # type: ignore[arg-type]  # checked by the config
        residency=residency,
        max_sweep_tokens=max_sweep_tokens,
        profile=profile,
    )
    rates = estimated_profile(gpu) if profile is None else load_profile(profile)
    names, spec = _policies(policies), planned_spec(config)
    spec = replace(spec, max_positions=max_positions or spec.max_positions)
    machine = _machine(config, spec, rates, max_sweep_s, max_wait_ms / 1000)
    workload = make_workload(mix, seed=seed, scale=scale) if trace is None else read_trace(trace)
    results = compare(workload, machine, workers, names, _tickets(workload, machine, model))
    (_print_json if as_json else _print_table)(machine, workload, workers, results)


def compare(
    workload: Workload, machine: Machine, workers: int, policies: Sequence[str], tickets: Sequence[Ticket]
) -> list[Result]:
    """A run of each policy over the same requests."""
    oracle = oracle_saved_tokens(tickets) / workload.num_tokens
    outcomes = [
        (name, simulate(tickets, machine, workers, make_policy(name, machine.costs, machine.limits)))
        for name in policies
    ]
    return [Result.of(name, outcome, oracle) for name, outcome in outcomes]


def _policies(text: str) -> list[str]:
    names = list(POLICIES) if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise UsageError(f"--policies: {', '.join(unknown)} is unknown; there are {', '.join(POLICIES)}, and all")
    return names


def _machine(
    config: EngineConfig, spec: ModelSpec, rates: MachineProfile, max_sweep_s: float | None, max_wait_s: float
) -> Machine:
    """The worker that these settings would make."""
    options = PlanOptions(config=config, gpu=rates.gpu, tokens_per_request=1024, json=False)
    plan = plan_for(config, spec, device_budget(options), dtype=computed_dtype(config, spec), profile=rates)
    return planned_machine(spec, rates, plan, peer=config.transport, max_sweep_s=max_sweep_s, max_wait_s=max_wait_s)


def _tickets(workload: Workload, machine: Machine, model: str) -> list[Ticket]:
    """The requests, hashed. InputError: there are none. UsageError: one fits no worker."""
    if not workload.requests:
        raise InputError(f"{workload.name}: there are no requests in it")
    longest = min(machine.admission.max_request_tokens, machine.sweep_tokens)
    too_long = sum(len(request.tokens) > longest for request in workload.requests)
    if too_long:
        most = max(len(request.tokens) for request in workload.requests)
        raise UsageError(
            f"{too_long} of {len(workload.requests)} requests have more than the {longest} tokens that a worker can "
            f"compute, up to {most}; give --max-positions, --max-sweep-tokens or more memory, or another workload"
        )
    hasher = BlockHasher(model)
    return [
        make_ticket(request, hasher, id=index, vocab_size=machine.spec.vocab_size, arrival_s=arrival_s)
        for index, (request, arrival_s) in enumerate(zip(workload.requests, workload.arrival_s.tolist(), strict=True))
    ]


def _print_json(machine: Machine, workload: Workload, workers: int, results: Sequence[Result]) -> None:
    about = {
        "workload": workload.name,
        "requests": len(workload.requests),
        "tokens": workload.num_tokens,
        "workers": workers,
        "profile": {"gpu": machine.profile.gpu, "estimated": machine.profile.is_estimated},
        "sweep_tokens": machine.sweep_tokens,
        "kv_blocks": machine.kv_blocks,
        "saturation_flops": machine.limits.saturated,
    }
    print(json.dumps({**about, "policies": [asdict(result) for result in results]}))


def _print_table(machine: Machine, workload: Workload, workers: int, results: Sequence[Result]) -> None:
    rates = "estimated" if machine.profile.is_estimated else f"measured {machine.profile.date}"
    console = Console(highlight=False)
    console.print(
        Text(
            f"{workload.name}: {len(workload.requests):,} requests, {workload.num_tokens:,} tokens; {workers} x "
            f"{machine.profile.gpu} ({rates}), sweeps of {machine.sweep_tokens:,} tokens, {machine.kv_blocks:,} KV "
            "blocks"
        ),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in ("tokens/s", "saved", "of oracle", "imbalance", "p50 s", "p99 s", "sweeps"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*_row(result))
    console.print(table)


def _row(result: Result) -> tuple[str, ...]:
    of_oracle = result.saved_fraction / result.oracle_fraction if result.oracle_fraction else None
    return (
        result.policy,
        f"{result.tokens_per_s:,.0f}",
        f"{result.saved_fraction:.1%}",
        "" if of_oracle is None else f"{of_oracle:.1%}",
        "" if result.imbalance is None else f"{result.imbalance:.3f}",
        f"{result.latency_p50_s:.2f}",
        f"{result.latency_p99_s:.2f}",
        f"{result.sweeps:,}",
    )
