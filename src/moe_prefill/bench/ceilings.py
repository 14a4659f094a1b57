"""What one operation takes on a device, and what the device reaches at the same moment."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_BATCH_MS = 4.0  # of calls that are timed together
_BATCHES = 5
_MATMUL = {"cuda": 8192, "cpu": 512}  # rows, columns and depth of the product that is the ceiling
Work = Callable[[], Any]


class Clock:
    """Median seconds of a call on the device, without its launch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, work: Work) -> float:
        for _ in range(2):  # compiles, chooses algorithms, fills the allocator
            work()
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        calls = max(1, min(50, round(_BATCH_MS / max(self._events_ms(work), 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        graph.replay()
        return 1e-3 * statistics.median(self._events_ms(graph.replay) for _ in range(_BATCHES)) / calls

    def _events_ms(self, work: Work) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


class Ceilings:
    """What the device reaches in this run."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._copies: dict[int, float] = {}
        self.flops = self._matmul()

    def again(self) -> None:
        """The rate of products once more: it falls as the device warms up."""
        self.flops = min(self.flops, self._matmul())

    def bytes_per_s(self, num_bytes: int) -> float:
        """Of a copy that reads and writes about ``num_bytes`` in all; small ones stay in the cache."""
        size = 1 << max(16, min(31, round(math.log2(num_bytes / 2))))
        if size not in self._copies:
            source = torch.zeros(size // 2, dtype=torch.bfloat16, device=self._clock.device)
            target = torch.empty_like(source)
            # Not copy_: a graph gives that to a copy engine, which is slower than a kernel.
            self._copies[size] = 2 * size / self._clock.seconds(lambda: torch.neg(source, out=target))
        return self._copies[size]

    def _matmul(self) -> float:
        size = _MATMUL[self._clock.device.type]
        a, b = (torch.randn(size, size, device=self._clock.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * size**3 / self._clock.seconds(lambda: a @ b)
