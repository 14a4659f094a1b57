"""The tiers of the aggregated workload, measured."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from moe_prefill.bench import save_report
from moe_prefill.core import AtomicRequest, ModelSpec, RunStats, ScoringEngine
from moe_prefill.forming import Forming
from moe_prefill.strategies import StrategyEngine, build_strategy_engine
from moe_prefill.workers import GroupEngine, RoutedEngine, Routing
from moe_prefill.workloads import Workload

from .aggregated import Tier, config_for, machine_of, side_of, tier_head, workload_of
from .contenders import Rank
from .measuring import compared
from .routed import sweeps_of
from .sides import Side


def measured(
    options: argparse.Namespace, spec: ModelSpec, forecasts: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Tiers of worker processes, each over the same requests, all handed in at once: one run to warm up, the median of
    the others.
    """
    for predicted in forecasts:
        tier = Tier.of(predicted)
        if tier.in_ranks or "refused" in predicted:
            continue
        side = side_of(options, tier, spec.num_layers)
        config = config_for(options, side)
        engine = GroupEngine(config) if tier.policy is None else RoutedEngine(config, Routing(policy=tier.policy))
        with closing(engine):
            workload = workload_of(options, spec, engine.limits.max_request_tokens)
            _seconds(engine, workload, "warm")
            before = engine.stats + RunStats()  # a copy
            runs = [_seconds(engine, workload, str(number)) for number in range(options.least_runs)]
            done, limits, peak = engine.stats - before, engine.limits, engine.peak_flops
        yield _cell(options, side, workload, predicted, runs, done, limits.max_sweep_tokens, peak)


def run_rank(
    rank: int, size: int, options: argparse.Namespace, folder: str, head: dict[str, Any], forecasts: Sequence[Any]
) -> None:
    """What each process does for baselines under a balancer; the first one writes the results."""
    mine = Rank(rank, size, options, folder)
    for strategy, tiers in itertools.groupby(forecasts, key=lambda predicted: predicted["strategy"]):
        side = side_of(options, Tier(strategy), options.depth)
        engine = build_strategy_engine(replace(config_for(options, side), gpus=None), mine.group)
        forming = Forming(limits=engine.limits, rule=engine.forming.rule)
        machine = machine_of(options, engine.spec, forming, options.machine_profile)
        workload = workload_of(options, engine.spec, engine.limits.max_request_tokens)
        for predicted in tiers:
            sweeps = sweeps_of(workload.requests, side, machine, predicted["policy"], engine.forming)[rank]
            runs, done = _timed(mine, engine, sweeps)
            if rank == 0:
                tokens, peak = engine.limits.max_sweep_tokens, engine.peak_flops
                cell = _cell(options, side, workload, predicted, runs, done, tokens, peak and peak * size)
                save_report(options.out, head, [cell], append=True)
        engine.close()
    dist.destroy_process_group()


def _timed(
    rank: Rank, engine: StrategyEngine, sweeps: Sequence[Sequence[AtomicRequest]]
) -> tuple[list[float], RunStats]:
    """Seconds of the runs behind the first, and what all ranks did in them."""

    def run() -> None:
        for _ in engine.compute(sweeps):
            pass

    rank.timed(run)
    before = engine.stats + RunStats()  # a copy
    runs = [rank.timed(run) for _ in range(rank.options.least_runs)]
    done = engine.stats - before
    if engine.share.is_data_parallel:
        names = ("flops", "prompt_tokens", "computed_tokens")
        done = replace(done, **{name: rank.total(getattr(done, name)) for name in names})
    return runs, done


def _cell(
    options: argparse.Namespace,
    side: Side,
    workload: Workload,
    predicted: dict[str, Any],
    runs: Sequence[float],
    done: RunStats,
    sweep_tokens: int,
    peak_flops: float | None,
) -> dict[str, Any]:
    """``done``: in all of the ``runs``, by all ranks."""
    tier, median = Tier.of(predicted), statistics.median(runs)
    rate = workload.num_tokens / median
    print(f"aggregated {tier}: {rate:,.0f} tokens/s", flush=True)
    return tier_head(options, side, tier, workload) | {
        "tokens_per_s": rate,
        **({"mfu": done.flops / len(runs) / median / peak_flops} if peak_flops else {}),
        "saved_fraction": done.saved_tokens / done.prompt_tokens,
        "sweep_tokens": sweep_tokens,
        **compared({"tokens_per_s": rate}, predicted),
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
