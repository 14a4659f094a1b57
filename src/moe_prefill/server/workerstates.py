"""The engine's workers one by one, as the status page and the metrics tell of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..core import ReportingEngine, WorkerState
from .scheduler import Scheduler


def worker_states(scheduler: Scheduler) -> Sequence[WorkerState]:
    """What the engine says of its workers. One that says nothing is one worker: its load is what it was given and has
    not answered, at the FLOPs that a token took so far.
    """
    engine = scheduler.engine
    if isinstance(engine, ReportingEngine):
        return engine.worker_states()
    stats = engine.stats
    load = scheduler.running_tokens * stats.flops // max(1, stats.computed_tokens)
    alive = scheduler.state != "failed"
    return [
        WorkerState(rank=0, alive=alive, load_flops=load, saturation_flops=None, residency={}, stats=stats),
    ]


def load_ratio(worker: WorkerState) -> float | None:
    """L_i over T."""
    return worker.load_flops / worker.saturation_flops if worker.saturation_flops else None


def exposed_share(worker: WorkerState) -> float | None:
    """The part of a worker's busy time in which it waited for expert banks."""
    return worker.stats.exposed_s / worker.stats.busy_s if worker.stats.busy_s else None


def worker_rows(scheduler: Scheduler) -> list[dict[str, Any]]:
    """Plain values for the status page."""
    return [
        {
            **asdict(worker),
            "residency": dict(worker.residency),
            "load_ratio": load_ratio(worker),
            "exposed_share": exposed_share(worker),
        }
        for worker in worker_states(scheduler)
    ]


def worker_metrics(scheduler: Scheduler) -> Iterator[Metric]:
    def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"moe_prefill_worker_{name}", text, labels=["worker", *labels])

    alive = gauge("alive", "1 while the worker computes or could.")
    load = gauge("load_flops", "L_i: FLOPs that it was given and has not done.")
    threshold = gauge("saturation_flops", "T: FLOPs of a sweep that hide its transfers.")
    ratio = gauge("load_ratio", "L_i over T.")
    exposed = gauge("exposed_ratio", "Part of its busy time in which it waited for expert banks.")
    layers = gauge("layers", "Layers by where their experts live.", "residency")
    tokens = CounterMetricFamily("moe_prefill_worker_computed_tokens", "Tokens that it computed.", labels=["worker"])
    for worker in worker_states(scheduler):
        rank = str(worker.rank)
        alive.add_metric([rank], worker.alive)
        load.add_metric([rank], worker.load_flops)
        tokens.add_metric([rank], worker.stats.computed_tokens)
        for family, value in (
            (threshold, worker.saturation_flops),
            (ratio, load_ratio(worker)),
            (exposed, exposed_share(worker)),
        ):
            if value is not None:
                family.add_metric([rank], value)
        for level, count in worker.residency.items():
            layers.add_metric([rank, level], count)
    yield from (alive, load, threshold, ratio, exposed, layers, tokens)
