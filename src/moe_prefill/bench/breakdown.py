"""Where a sweep's time goes, read from a torch.profiler trace of one sweep that is not among the timed ones.

On a GPU what counts are the kernels of the compute stream, each classified by its name and by the operation that
launched it: launches are found by correlation id, and operations are record_function ranges put around the public
functions of ``ops`` for that sweep alone. On a CPU torch's operators take the place of kernels, each without what it
calls.
"""

from __future__ import annotations

import bisect
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .. import ops
from ..core import AtomicRequest
from ..engine import LocalEngine

Category = Literal["attention", "experts", "dense", "memory-bound", "exposed transfer", "gaps"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
_PREFIX = "moe_prefill."
_ATTENTION = re.compile(r"flash|fmha|attention", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|cutlass|nvjet|xmma|wgmma|grouped_mm|matmul|::mm|::bmm|addmm|baddbmm|linear", re.IGNORECASE)
_NO_PRODUCT = re.compile(r"quant|swiglu|combine|gather|elementwise|silu_and|rms_?norm", re.IGNORECASE)
_KEPT_KERNELS = 24  # the longest ones, by name


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel, or a stretch of an operator: microseconds, and the operation of ours that it belongs to ("": none)."""

    name: str
    operation: str
    begin: float
    end: float


def breakdown(engine: LocalEngine, requests: Sequence[AtomicRequest]) -> dict[str, Any]:
    """Milliseconds of a sweep by category, and of its longest kernels as (operation, kernel, ms)."""
    on_gpu = engine.device_kind == "cuda"
    engine.transfers.clear()
    trace = _trace(lambda: engine.score(requests), on_gpu)
    spans = gpu_spans(trace) if on_gpu else cpu_spans(trace)
    exposed_ms = sum(sweep.exposed_ms for sweep in engine.transfers)
    return {"layers": engine.num_layers, **summary(spans, exposed_ms)}


def summary(spans: Sequence[Span], exposed_ms: float = 0.0) -> dict[str, Any]:
    """Categories add up to ``sweep_ms``, the time from the first span to the last one's end. Where spans of several
    threads run side by side, each has its share of the time in which any ran.
    """
    if not spans:
        return {"sweep_ms": 0.0, "ms": {}, "kernels": []}
    busy_ms, total_ms = 1e-3 * _union(spans), 1e-3 * (max(s.end for s in spans) - min(s.begin for s in spans))
    scale = busy_ms / max(1e-9, sum(span.end - span.begin for span in spans))
    by_category: dict[Category, float] = dict.fromkeys(CATEGORIES, 0.0)
    by_kernel: defaultdict[tuple[str, str], float] = defaultdict(float)
    for span in spans:
        ms = scale * (span.end - span.begin)
        by_category[classify(span.name, span.operation)] += ms
        by_kernel[(span.operation, _short(span.name))] += ms
    by_category["exposed transfer"] = exposed_ms
    by_category["gaps"] = max(0.0, total_ms - busy_ms - exposed_ms)
    longest = sorted(by_kernel, key=lambda names: -by_kernel[names])[:_KEPT_KERNELS]
    return {"sweep_ms": total_ms, "ms": by_category, "kernels": [[*names, by_kernel[names]] for names in longest]}


def classify(name: str, operation: str) -> Category:
    """The category of a kernel by its name and the operation of ours around it."""
    if operation in ("attention", "merge_") or _ATTENTION.search(name):
        return "attention"
    if not _PRODUCT.search(name) or (_NO_PRODUCT.search(name) and "gemm" not in name.lower()):
        return "memory-bound"
    return "experts" if operation == "experts" else "dense"


def gpu_spans(trace: Iterable[dict[str, Any]]) -> list[Span]:
    """Kernels, copies and fills of the stream with the most kernel time: the one that computes."""
    events = [event for event in trace if event.get("ph") == "X"]
    operation = _Operations(events)
    launch = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy: Counter[Any] = Counter()
    for event in kernels:
        busy[event["args"].get("stream")] += event["dur"] if event["cat"] == "kernel" else 0
    if not busy:
        return []
    compute = busy.most_common(1)[0][0]
    return [
        Span(event["name"], operation.of(launch.get(event["args"].get("correlation"))), *_interval(event))
        for event in kernels
        if event["args"].get("stream") == compute
    ]


def cpu_spans(trace: Iterable[dict[str, Any]]) -> list[Span]:
    """What torch's operators did themselves on each thread: the time in which they called no other."""
    events = [event for event in trace if event.get("ph") == "X"]
    operation = _Operations(events)
    calls: dict[Any, list[dict[str, Any]]] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event.get("cat") == "cpu_op":
            calls.setdefault(event["tid"], []).append(event)
    spans: list[Span] = []
    for thread in calls.values():
        for event, begin, end in _own_time(thread):
            spans.append(Span(event["name"], operation.of(event), begin, end))
    return spans


def _own_time(calls: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float, float]]:
    """The stretches of each call that no call inside it covers; calls in order of their beginning, outer ones first."""
    running: list[dict[str, Any]] = []
    now = float("-inf")
    for call in [*calls, None]:
        begin = float("inf") if call is None else float(call["ts"])
        while running:
            stop = min(begin, _interval(running[-1])[1])
            if stop > now:
                yield running[-1], now, stop
            now = max(now, stop)
            if stop == begin:
                break
            running.pop()
        if call is not None:
            running.append(call)
            now = begin


class _Operations:
    """Finds the operation of ours that was running on an event's thread when it began."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        self._ranges: dict[Any, list[tuple[float, float, str]]] = {}
        for event in events:
            if event.get("cat") == "user_annotation" and event["name"].startswith(_PREFIX):
                begin, end = _interval(event)
                self._ranges.setdefault(event["tid"], []).append((begin, end, event["name"].removeprefix(_PREFIX)))
        for ranges in self._ranges.values():
            ranges.sort()

    def of(self, event: dict[str, Any] | None) -> str:
        """Its name; an empty string: none, or the launch was not seen."""
        ranges = [] if event is None else self._ranges.get(event["tid"], [])
        if event is None or not ranges:
            return ""
        # The last range that began before; ranges do not nest, since only calls from outside ``ops`` are marked.
        at = bisect.bisect_right(ranges, (event["ts"], float("inf"), "")) - 1
        return ranges[at][2] if at >= 0 and event["ts"] < ranges[at][1] else ""


@contextmanager
def marked_operations() -> Iterator[None]:
    """Every public function of ``ops`` runs inside a record_function range of its name, when called from outside."""
    with ExitStack() as stack:
        for name in ops.__all__:
            function = getattr(ops, name)
            if callable(function) and not isinstance(function, type):
                stack.enter_context(mock.patch.object(ops, name, _marked(name, function)))
        yield


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + name):
            return function(*args, **kwargs)

    return call


def _trace(work: Callable[[], object], on_gpu: bool) -> list[dict[str, Any]]:
    """The events of a Chrome trace of ``work``; on a CPU other threads compute too."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes would stand among ours
    threads = None if on_gpu else torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with marked_operations(), profile(activities=activities, experimental_config=threads) as recorded:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def _interval(event: dict[str, Any]) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _union(spans: Sequence[Span]) -> float:
    """Microseconds in which any span ran."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, reached))
        reached = max(reached, span.end)
    return total


def _short(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    plain = name.removeprefix("void ").split("(")[0]
    return plain if len(plain) <= 80 else plain[:77] + "..."
