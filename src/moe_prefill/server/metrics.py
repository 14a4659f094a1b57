"""What the server counts, in Prometheus' text form; TEI's names where it has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .scheduler import Call, Lane, Scheduler
from .service import Answer
from .workerstates import worker_metrics, worker_rows

_LANES: tuple[Lane, ...] = ("interactive", "batch")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_RECENT = 20  # errors that the status page shows


@dataclass(frozen=True, slots=True)
class RecentError:
    """An error as the status page shows it: no text of a prompt and no tenant."""

    time: str
    path: str
    status: int
    code: str
    request_id: str


class Metrics:
    """Told of every reply and every call of the engine."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        scheduler.observe = self.called
        self.recent: deque[RecentError] = deque(maxlen=_RECENT)
        self.registry = CollectorRegistry()
        counter, registry = Counter, self.registry
        self._replies = counter(
            "moe_prefill_requests", "Replies by path and status.", ("path", "status"), registry=registry
        )
        self._errors = counter("moe_prefill_errors", "Errors by kind.", ("code",), registry=registry)
        self._duration = _histogram("te_request_duration", "Seconds of a request.", _SECONDS, registry)
        self._tokenize = _histogram(
            "te_request_tokenization_duration", "Seconds of planning and encoding.", _SECONDS, registry
        )
        self._queue = _histogram("te_request_queue_duration", "Seconds in the queue.", _SECONDS, registry)
        self._inference = _histogram("te_request_inference_duration", "Seconds in the engine.", _SECONDS, registry)
        self._length = _histogram("te_request_input_length", "Tokens of a request.", _TOKENS, registry)
        self._call_size = _histogram(
            "te_batch_next_size", "Atomic requests of a call of the engine.", _TOKENS, registry
        )
        self._call_tokens = _histogram(
            "te_batch_next_tokens", "Tokens of a call, prefixes shared within its requests.", _TOKENS, registry
        )
        self._call_s = _histogram("moe_prefill_call_duration_seconds", "Seconds of a call.", _SECONDS, registry)
        self.registry.register(_Engine(self))
        self.count = self.success = 0
        self.failures: dict[str, int] = {}

    def called(self, call: Call, seconds: float) -> None:
        self._call_size.observe(call.num_requests)
        self._call_tokens.observe(call.tokens)
        self._call_s.observe(seconds)

    def replied(self, path: str, answer: Answer, request_id: str, time: str) -> None:
        """``path`` is one of ours, never what a client made up."""
        self._replies.labels(path, str(answer.status)).inc()
        self.count += 1
        if answer.code:
            self._errors.labels(answer.code).inc()
            kind = {"batch_too_large": "batch_size", "bad_json": "validation"}.get(answer.code, answer.code)
            self.failures[kind] = self.failures.get(kind, 0) + 1
            self.recent.append(RecentError(time, path, answer.status, answer.code, request_id))
            return
        self.success += 1
        self._duration.observe(answer.timings.total_s)
        self._tokenize.observe(answer.timings.tokenize_s)
        self._queue.observe(answer.timings.queue_s)
        self._inference.observe(answer.timings.inference_s)
        self._length.observe(answer.prompt_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def status(self) -> dict[str, Any]:
        """For the status page: state, queues, the engine's counters, recent errors."""
        engine, scheduler = self.scheduler.engine, self.scheduler
        stats = engine.stats
        queues = {lane: dict(zip(("requests", "tokens"), scheduler.queued(lane), strict=True)) for lane in _LANES}
        peak = engine.peak_flops
        return {
            "state": scheduler.state,
            "queues": queues,
            "max_queue_tokens": scheduler.policy.max_queue_tokens,
            "tokens_per_s": scheduler.pace.tokens_per_s,
            "limits": asdict(engine.limits),
            "stats": {**asdict(stats), "saved_tokens": stats.saved_tokens},
            "workers": worker_rows(scheduler),
            "mfu": stats.flops / stats.busy_s / peak if peak and stats.busy_s else None,
            "requests": {"all": self.count, "answered": self.success, "errors": dict(sorted(self.failures.items()))},
            "recent_errors": [asdict(error) for error in self.recent],
        }


class _Engine(Collector):
    """The engine's counters and the queues, read when they are asked for."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics, scheduler = self._metrics, self._metrics.scheduler
        stats = asdict(scheduler.engine.stats)
        for name, value in stats.items():
            unit = f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name
            yield CounterMetricFamily(f"moe_prefill_engine_{unit}", f"RunStats.{name} since the start.", value=value)
        saved = stats["prompt_tokens"] - stats["computed_tokens"]
        yield CounterMetricFamily("moe_prefill_engine_saved_tokens", "Prefix tokens not computed again.", value=saved)
        peak = scheduler.engine.peak_flops
        if stats["busy_s"]:
            exposed = stats["exposed_s"] / stats["busy_s"]
            text = "Part of the busy time in which computation waited for expert banks."
            yield GaugeMetricFamily("moe_prefill_exposed_transfer_ratio", text, value=exposed)
        if peak and stats["busy_s"]:
            mfu = stats["flops"] / stats["busy_s"] / peak
            yield GaugeMetricFamily("moe_prefill_mfu", "Model FLOPs utilisation while busy.", value=mfu)
        yield from worker_metrics(scheduler)
        if scheduler.pace.tokens_per_s is not None:
            yield GaugeMetricFamily(
                "moe_prefill_tokens_per_second", "In full calls.", value=scheduler.pace.tokens_per_s
            )
        waiting = GaugeMetricFamily("moe_prefill_queue_requests", "Requests that wait.", labels=["lane"])
        tokens = GaugeMetricFamily("moe_prefill_queue_tokens", "Tokens that wait.", labels=["lane"])
        for lane in _LANES:
            size, num_tokens = scheduler.queued(lane)
            waiting.add_metric([lane], size)
            tokens.add_metric([lane], num_tokens)
        yield waiting
        yield tokens
        state = GaugeMetricFamily("moe_prefill_state", "1 for the present state.", labels=["state"])
        state.add_metric([scheduler.state], 1)
        yield state
        # TEI's counters have no _total at the end, which a counter would get here.
        yield GaugeMetricFamily("te_queue_size", "Requests that wait.", value=scheduler.queued("interactive")[0])
        yield GaugeMetricFamily("te_request_count", "Requests.", value=metrics.count)
        yield GaugeMetricFamily("te_request_success", "Requests that were answered.", value=metrics.success)
        failures = GaugeMetricFamily("te_request_failure", "Requests that got an error.", labels=["err"])
        for kind, count in metrics.failures.items():
            failures.add_metric([kind], count)
        yield failures


def _histogram(name: str, help_text: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(name, help_text, buckets=buckets, registry=registry)
