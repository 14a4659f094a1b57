"""Seconds of work on a device: warmed up, repeated, median."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

_LEAST_RUNS, _MOST_RUNS = 3, 100


def seconds(work: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Median seconds of ``work``, repeated for about ``budget_s``. CUDA: by events, launched without waiting."""
    work()
    once_s = _wall(work, device)  # also warm-up: the first run compiled and allocated
    runs = int(min(max(budget_s / max(once_s, 1e-9), _LEAST_RUNS), _MOST_RUNS))
    if device.type != "cuda":
        return statistics.median(_wall(work, device) for _ in range(runs))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(float(a.elapsed_time(b)) * 1e-3 for a, b in itertools.pairwise(marks))


def _wall(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has done its work already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
