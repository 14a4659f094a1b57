"""The aggregated workload over real workers: dp+ep, and asyncep under the balancer of vLLM and with our frontend."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from moe_prefill.blocks import BlockHasher
from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest, ModelSpec, ScoringEngine
from moe_prefill.costmodel import Batch, predict_strategy
from moe_prefill.forming import Forming, sharing_rule
from moe_prefill.frontend import Machine, make_policy, make_ticket
from moe_prefill.residency import plan_for
from moe_prefill.residency.speed import PRECISIONS, with_chunks
from moe_prefill.simulate import simulate
from moe_prefill.simulate.machine import planned_machine
from moe_prefill.strategies import share_of
from moe_prefill.strategies.memory import fit_share
from moe_prefill.workers import GroupEngine, RoutedEngine, Routing
from moe_prefill.workloads import Workload, make_workload

from .contenders import ASYNCEP, Side, config_of
from .forecasts import Forecaster
from .measuring import cell_head

POLICIES = {"vllm": "off", "ours": "on"}  # the frontend
BASELINE = "dp+ep"


def side_of(options: argparse.Namespace, strategy: str, depth: int) -> Side:
    residency = None if strategy != ASYNCEP else "sharded" if options.gpus > 1 else "auto"
    return Side(
        part="aggregated",
        strategy=strategy,
        gpus=options.gpus,
        skew=1.0,
        layers=depth,
        lengths=(),
        residency=residency,
    )


def config_for(options: argparse.Namespace, side: Side) -> EngineConfig:
    """As jobs and servers run: sharing, and a last layer of the asked rows."""
    return replace(
        config_of(options, side),
        gpus=options.gpus,
        sharing="auto",
        prune_last=True,
        max_sweep_tokens=max(options.sweeps),
        keep_prefixes=side.strategy == ASYNCEP,
        profile=options.profile_path if side.strategy == ASYNCEP else None,
    )


def forecast(options: argparse.Namespace, forecaster: Forecaster) -> list[dict[str, Any]]:
    """The tiers, on the assumed memory: dp+ep by the cost model of its sweeps, asyncep by the simulator."""
    spec, dtype, profile = forecaster.spec, forecaster.dtype, forecaster.profile
    cells = [_baseline_forecast(options, forecaster)] if options.gpus > 1 and BASELINE in options.strategies else []
    side = side_of(options, ASYNCEP, spec.num_layers)
    plan = plan_for(config_for(options, side), spec, forecaster.budget(side.gpus), dtype=dtype, profile=profile)
    machine = planned_machine(spec, with_chunks(profile, plan.sweep.chunk_rows), plan)
    workload = workload_of(options, spec, plan.longest_request)
    for policy in POLICIES:
        rate = _simulated(machine, workload, policy, side.gpus)
        cells.append(_head(options, side, policy, workload) | {"predicted_tokens_per_s": rate})
    return cells


def _baseline_forecast(options: argparse.Namespace, forecaster: Forecaster) -> dict[str, Any]:
    """Ranks go through a round of sweeps in step, each round as long as its longest."""
    spec, side = forecaster.spec, side_of(options, BASELINE, forecaster.spec.num_layers)
    budget, stored = forecaster.budget(side.gpus), forecaster.stored
    share, wanted = share_of(spec, BASELINE, 0, side.gpus), max(options.sweeps)
    memory = fit_share(
        share, budget.kind, budget.device_bytes, dtype=forecaster.dtype, bank_dtype=stored, wanted=wanted
    ).sweep
    workload = workload_of(options, spec, min(spec.max_positions, memory.max_sweep_tokens))
    forming = Forming(limits=memory.limits(spec), rule=sharing_rule(spec, "auto"))
    profile = with_chunks(forecaster.profile, memory.chunk_rows)

    def seconds(sweep: list[int]) -> float:
        requests = [workload.requests[index] for index in sweep]
        batch = Batch.from_requests(requests, forming.salts(requests), forming.rule, spec.vocab_size)
        return predict_strategy(spec, BASELINE, side.gpus, batch, profile, precision=PRECISIONS[stored]).sweep_s

    sweeps = list(forming.sweeps(workload.requests, range(len(workload.requests))))
    rounds = (max(map(seconds, sweeps[first : first + side.gpus])) for first in range(0, len(sweeps), side.gpus))
    return _head(options, side, None, workload) | {"predicted_tokens_per_s": workload.num_tokens / sum(rounds)}


def workload_of(options: argparse.Namespace, spec: ModelSpec, longest: int) -> Workload:
    return make_workload("aggregated", scale=options.scale).fitted(longest, spec.vocab_size)


def _head(options: argparse.Namespace, side: Side, policy: str | None, workload: Workload) -> dict[str, Any]:
    routed = {} if policy is None else {"policy": policy, "frontend": POLICIES[policy]}
    sizes = {"requests": len(workload.requests), "prompt_tokens": workload.num_tokens}
    return cell_head(options, side, "aggregated") | routed | sizes


def _simulated(machine: Machine, workload: Workload, policy: str, workers: int) -> float:
    hasher = BlockHasher("simulated")
    tickets = [
        make_ticket(request, hasher, id=index, vocab_size=machine.spec.vocab_size)
        for index, request in enumerate(workload.requests)
    ]
    outcome = simulate(tickets, machine, workers, make_policy(policy, machine.costs, machine.limits))
    return float(outcome.tokens_per_s)


def measured(
    options: argparse.Namespace, spec: ModelSpec, forecasts: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each tier over the same requests, all handed in at once: one run to warm up, the median of the others."""
    for predicted in forecasts:
        side, policy = side_of(options, predicted["strategy"], spec.num_layers), predicted.get("policy")
        config = config_for(options, side)
        engine = GroupEngine(config) if policy is None else RoutedEngine(config, Routing(policy=policy))
        with closing(engine):
            workload = workload_of(options, spec, engine.limits.max_request_tokens)
            runs = [_seconds(engine, workload, str(number)) for number in range(options.least_runs + 1)]
            stats, limits = engine.stats, engine.limits
        rate = workload.num_tokens / statistics.median(runs[1:])
        print(f"aggregated {side.name}, balancer {policy or '-'}: {rate:,.0f} tokens/s", flush=True)
        yield _head(options, side, policy, workload) | {
            "tokens_per_s": rate,
            "saved_fraction": stats.saved_tokens / stats.prompt_tokens,
            "sweep_tokens": limits.max_sweep_tokens,
            "predicted_tokens_per_s": predicted["predicted_tokens_per_s"],
            "measured_over_predicted": rate / predicted["predicted_tokens_per_s"],
        }


def _seconds(engine: ScoringEngine, workload: Workload, salt: str) -> float:
    """From handing everything in to the last answer, as if nothing of it had been computed before."""
    requests: list[AtomicRequest] = [replace(request, salt=salt) for request in workload.requests]
    begun = time.perf_counter()
    answers = engine.score(requests)
    taken_s = time.perf_counter() - begun
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert not failed, failed[0]
    return taken_s
