"""Our engine on cells: rates, MFU, prediction, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from .. import ops
from ..core import AtomicRequest, AtomicResult, ScoringEngine
from ..costmodel import Batch, predict_sweep
from ..engine import LocalEngine, peak_bytes
from ..errors import UsageError
from ..machine import MachineProfile, estimated_profile, load_profile
from ..residency.speed import PRECISIONS, with_chunks
from ..workers import build_scoring
from .breakdown import breakdown
from .cells import CHECKED_REQUESTS, CHECKED_TOKENS, Cell
from .job import Job, long_enough
from .timing import Timing

_LONG_S = 6.0  # sweeps longer than this are not run again for their breakdown
_ROUTED_TOKENS = 8192  # of the sweep in which experts' loads are counted

Tell = Callable[[dict[str, Any]], None]


def run_ours(job: Job, tell: Tell = lambda cell: None) -> list[dict[str, Any]]:
    """Every cell's result, by the keys of result files; ``tell`` hears each when it is done. Raises what building the
    engine raises, and UsageError for a cell that does not fit its sweep.
    """
    with long_enough(job) as fitting:
        engine = build_scoring(fitting.config)
        try:
            cells = []
            for cell in job.parsed:
                cells.append(measure(engine, cell, job))
                tell(cells[-1])
        finally:
            engine.close()
    return cells


def measure(engine: ScoringEngine, cell: Cell, job: Job) -> dict[str, Any]:
    """One cell."""
    ranks, limits = job.config.gpus or 1, engine.limits
    if cell.tokens > limits.max_request_tokens:
        raise UsageError(
            f"cell {cell} has requests of {cell.tokens:,} tokens; the longest that this engine takes has "
            f"{limits.max_request_tokens:,} (--max-tokens, or the model's context)"
        )
    requests = cell.requests(ranks * cell.families(limits.max_sweep_tokens), limits.vocab_size)
    if isinstance(engine, LocalEngine):
        return _local(engine, cell, requests, job)
    before = engine.stats
    timing = _timed_calls(engine, requests, job.seconds)
    return _fields(job, cell, requests, timing, engine, engine.stats - before)


def _local(engine: LocalEngine, cell: Cell, requests: list[AtomicRequest], job: Job) -> dict[str, Any]:
    """On one device also memory, transfers, the prediction, and the breakdown in a sweep of its own."""
    logits = first_logits(engine, requests)
    requests = _one_sweep(engine, requests)
    if engine.device_kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = engine.stats + type(engine.stats)()  # a copy: the engine counts on in the same object
    engine.transfers.clear()
    timing = timed_sweeps(engine, requests, job.seconds)
    found = _fields(job, cell, requests, timing, engine, engine.stats - before)
    found |= _memory(engine) | _exposed(engine) | _predicted(engine, requests, job)
    load = _load_max_over_mean(engine, requests)
    found |= {"logits": logits} if logits else {}
    found |= {"expert_load_max_over_mean": load} if load else {}
    if job.breakdown and timing.median <= _LONG_S:
        found["breakdown"] = breakdown(engine, requests)
    return found


def first_logits(engine: ScoringEngine, requests: Sequence[AtomicRequest]) -> list[list[float]]:
    """The candidates' logits of the first few requests, which a peer with the same weights must give too."""
    few = requests[: min(CHECKED_REQUESTS, CHECKED_TOKENS // len(requests[0].tokens))]
    return [
        [float(value) for value in answer.logits] for answer in engine.score(few) if isinstance(answer, AtomicResult)
    ]


def _one_sweep(engine: LocalEngine, requests: list[AtomicRequest]) -> list[AtomicRequest]:
    first = next(engine.forming.sweeps(requests, range(len(requests))))
    return [requests[index] for index in first]


def timed_sweeps(engine: LocalEngine, requests: Sequence[AtomicRequest], seconds: float) -> Timing:
    """Sweeps one behind the other, each planned while the one before it runs, as in a job.

    A sweep's answers are read when the next one is enqueued, which waits where the device's queue is full. The last
    one's come sooner, so one more is run than is timed.
    """
    timing = Timing(seconds)

    def sweeps() -> Iterator[Sequence[AtomicRequest]]:
        launched = 0
        while timing.goal is None or launched <= timing.goal:
            yield requests
            launched += 1

    last = time.perf_counter()
    for _ in engine.compute(sweeps()):
        now = time.perf_counter()
        if not timing.is_done:
            timing.add(now - last)
        last = now
    return timing


def _timed_calls(engine: ScoringEngine, requests: Sequence[AtomicRequest], seconds: float) -> Timing:
    """Calls of several workers' engine, a sweep for each worker."""
    timing = Timing(seconds)
    while not timing.is_done:
        start = time.perf_counter()
        engine.score(requests)
        timing.add(time.perf_counter() - start)
    return timing


def _fields(
    job: Job, cell: Cell, requests: Sequence[AtomicRequest], timing: Timing, engine: ScoringEngine, done: Any
) -> dict[str, Any]:
    tokens = sum(len(request.tokens) for request in requests)
    flops = done.flops / (done.requests / len(requests))
    peak = engine.peak_flops
    found = {
        "model": job.name,
        "layers": getattr(engine, "num_layers", job.config.num_layers),
        "precision": job.precision,
        "tokens": cell.tokens,
        "requests": len(requests) * len(timing.timed),
        "sweep_tokens": done.computed_tokens // done.sweeps,
        "strategy": job.config.strategy,
        "prune_last": job.config.prune_last,
        "tokens_per_s": tokens / timing.median,
        "mfu": flops / timing.median / peak if peak else None,
        "sweep_ms": 1e3 * timing.median,
        "first_sweep_ms": 1e3 * timing.first,
        "chunk_rows": engine.limits.chunk_rows,
    }
    if cell.shares:
        found |= {"siblings": cell.siblings, "tail": cell.tail, "requests_per_s": len(requests) / timing.median}
    if job.config.dummy_skew:
        found["dummy_skew"] = job.config.dummy_skew
    return {key: value for key, value in found.items() if value is not None}


def _memory(engine: LocalEngine) -> dict[str, Any]:
    found: dict[str, Any] = {} if engine.residency is None else {"residency": engine.residency.map}
    if engine.device_kind == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        found["attention_kernel"] = ops.flash_kernel(device).name
        found["experts_kernel"] = engine.experts_kernel
        found["peak_hbm_gib"] = peak_bytes(device) / 2**30
    return found


def _exposed(engine: LocalEngine) -> dict[str, Any]:
    """The last sweep's waiting, and the first one's, where banks stream."""
    streamed = [sweep for sweep in engine.transfers if sweep.bytes_by_link]
    if not streamed:
        return {}
    return {"exposed_ms": streamed[-1].exposed_ms, "exposed_first_ms": streamed[0].exposed_first_ms}


def _predicted(engine: LocalEngine, requests: Sequence[AtomicRequest], job: Job) -> dict[str, Any]:
    """What the cost model says of this sweep with every bank resident, or nothing where no rate is known."""
    name = torch.cuda.get_device_name() if engine.device_kind == "cuda" else "cpu"
    forming = engine.forming
    batch = Batch.from_requests(requests, forming.salts(requests), forming.rule, engine.spec.vocab_size)
    if not job.config.prune_last:
        batch = Batch(batch.rows, batch.rows, batch.asked_rows, batch.head_rows)
    precision = PRECISIONS[engine.residency.bank_dtype if engine.residency else "bfloat16"]
    for profile in _profiles(job, name):
        try:
            sweep = predict_sweep(
                engine.spec, batch, with_chunks(profile, engine.memory.chunk_rows), precision=precision
            )
        except UsageError:  # this precision was not measured
            continue
        tokens = sum(len(request.tokens) for request in requests)
        peak = engine.peak_flops
        return {
            "predicted_tokens_per_s": tokens / sweep.sweep_s,
            **({"predicted_mfu": sweep.flops / sweep.sweep_s / peak} if peak else {}),
            "predicted_from": "estimate" if profile.is_estimated else f"profile of {profile.model}, {profile.date}",
        }
    return {}


def _profiles(job: Job, name: str) -> Iterator[MachineProfile]:
    if job.profile is not None:
        yield load_profile(job.profile, name)
    try:
        yield estimated_profile(name)
    except UsageError:  # a device that nothing is known of
        return


@torch.inference_mode()
def _load_max_over_mean(engine: LocalEngine, requests: Sequence[AtomicRequest]) -> float | None:
    """Tokens of the most loaded expert over the mean, averaged over layers, in a sweep of a few requests."""
    loads: list[torch.Tensor] = []
    route, experts = ops.route, engine.spec.num_experts
    few = max(1, _ROUTED_TOKENS // max(len(request.tokens) for request in requests))

    def counted(*args: Any, **kwargs: Any) -> Any:
        weights, ids = route(*args, **kwargs)
        loads.append(torch.bincount(ids.flatten(), minlength=experts))
        return weights, ids

    with mock.patch.object(ops, "route", counted):
        engine.score(requests[:few])
    if not loads:
        return None
    heaviest = [load.max() / load.float().mean() for load in loads if int(load.sum()) >= 8 * experts]
    return float(torch.stack(heaviest).mean()) if heaviest else None
