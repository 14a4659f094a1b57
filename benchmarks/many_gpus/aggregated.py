"""The aggregated workload over real workers: asyncep with our frontend, and under the balancer of vLLM."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from moe_prefill.blocks import BlockHasher
from moe_prefill.core import AtomicRequest, ModelSpec
from moe_prefill.frontend import Machine, make_policy, make_ticket
from moe_prefill.residency import Pins, plan_residency
from moe_prefill.residency.speed import with_chunks
from moe_prefill.simulate import simulate
from moe_prefill.simulate.machine import planned_machine
from moe_prefill.workers import RoutedEngine, Routing
from moe_prefill.workloads import Workload, make_workload

from .contenders import ASYNCEP, Side, config_of
from .forecasts import Forecaster
from .measuring import cell_head

POLICIES = {"ours": "on", "vllm": "off"}  # the frontend


def side_of(options: argparse.Namespace, depth: int) -> Side:
    return Side(
        part="aggregated",
        strategy=ASYNCEP,
        gpus=options.gpus,
        skew=1.0,
        layers=depth,
        lengths=(),
        residency="sharded" if options.gpus > 1 else "auto",
    )


def forecast(options: argparse.Namespace, forecaster: Forecaster) -> list[dict[str, Any]]:
    """By the simulator, on the machine that the memory plan makes of the assumed memory."""
    spec = forecaster.spec
    side = side_of(options, spec.num_layers)
    pins = Pins(residency=side.residency, max_sweep_tokens=max(options.sweeps))
    plan = plan_residency(
        spec, forecaster.budget(side.gpus), dtype=forecaster.dtype, bank_dtype=forecaster.stored, pins=pins
    )
    machine = planned_machine(spec, with_chunks(forecaster.profile, plan.sweep.chunk_rows), plan)
    workload = workload_of(options, spec, plan.longest_request)
    return [
        _head(options, side, policy, workload)
        | {"predicted_tokens_per_s": _simulated(machine, workload, policy, side.gpus)}
        for policy in POLICIES
    ]


def workload_of(options: argparse.Namespace, spec: ModelSpec, longest: int) -> Workload:
    return make_workload("aggregated", scale=options.scale).fitted(longest, spec.vocab_size)


def _head(options: argparse.Namespace, side: Side, policy: str, workload: Workload) -> dict[str, Any]:
    return cell_head(options, side, "aggregated") | {
        "policy": policy,
        "frontend": POLICIES[policy],
        "requests": len(workload.requests),
        "prompt_tokens": workload.num_tokens,
    }


def _simulated(machine: Machine, workload: Workload, policy: str, workers: int) -> float:
    hasher = BlockHasher("simulated")
    tickets = [
        make_ticket(request, hasher, id=index, vocab_size=machine.spec.vocab_size)
        for index, request in enumerate(workload.requests)
    ]
    outcome = simulate(tickets, machine, workers, make_policy(policy, machine.costs, machine.limits))
    return float(outcome.tokens_per_s)


def measured(options: argparse.Namespace, spec: ModelSpec, forecasts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each policy over the same requests, all handed in at once: one run to warm up, the median of the others."""
    side, cells = side_of(options, spec.num_layers), []
    config = replace(
        config_of(options, side),
        gpus=options.gpus,
        sharing="auto",
        prune_last=True,
        max_sweep_tokens=max(options.sweeps),
        profile=options.profile_path,
    )
    for predicted in forecasts:
        policy = predicted["policy"]
        with closing(RoutedEngine(config, Routing(policy=policy))) as engine:
            workload = workload_of(options, spec, engine.limits.max_request_tokens)
            runs = [_seconds(engine, workload, str(number)) for number in range(options.least_runs + 1)]
            stats = engine.stats
        rate = workload.num_tokens / statistics.median(runs[1:])
        saved = stats.saved_tokens / stats.prompt_tokens
        cells.append(
            _head(options, side, policy, workload)
            | {"tokens_per_s": rate, "saved_fraction": saved, "sweep_tokens": engine.limits.max_sweep_tokens}
            | {"predicted_tokens_per_s": predicted["predicted_tokens_per_s"]}
            | {"measured_over_predicted": rate / predicted["predicted_tokens_per_s"]}
        )
        print(f"aggregated {ASYNCEP}, frontend {POLICIES[policy]} ({policy}): {rate:,.0f} tokens/s", flush=True)
    return cells


def _seconds(engine: RoutedEngine, workload: Workload, salt: str) -> float:
    """From handing everything in to the last answer, as if nothing of it had been computed before."""
    requests: list[AtomicRequest] = [replace(request, salt=salt) for request in workload.requests]
    begun = time.perf_counter()
    answers = engine.score(requests)
    taken_s = time.perf_counter() - begun
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert not failed, failed[0]
    return taken_s
