"""A worker process whose engine has no weights and no torch: answers are a function of the tokens, layers are pauses.

The settings of a run are in the config's ``model``, a JSON object: ``build_s``, ``layer_s``, ``fail`` (raise that error
while building), ``schedule``, ``poison`` (the process dies of a request with this token).
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moe_prefill import errors
from moe_prefill.core import AtomicRequest, AtomicResult, EngineLimits, RunStats
from moe_prefill.forest import SHARE_EVERYTHING
from moe_prefill.forming import Forming
from moe_prefill.messages import Start
from moe_prefill.workers import process
from moe_prefill.workers.page import ProgressPage

LAYERS = 3
FORMING = Forming(
    limits=EngineLimits(max_request_tokens=64, max_sweep_tokens=64, vocab_size=1000), rule=SHARE_EVERYTHING
)


def answer(request: AtomicRequest) -> AtomicResult:
    seed = zlib.crc32(request.tokens.tobytes())
    return AtomicResult(((request.ids.astype(np.int64) * 7919 + seed) % 10007).astype(np.float32))


class FakeEngine:
    """The part of ``LocalEngine`` that a worker uses."""

    forming = FORMING
    limits = FORMING.limits
    plan_digest = "fake"
    peak_flops = 1e12
    num_layers = LAYERS
    device_kind = "fake"

    def __init__(self, start: Start, rank: int, page_fd: int, store_fd: int) -> None:
        self.facts = json.loads(start.config.model)
        if "fail" in self.facts:
            raise getattr(errors, self.facts["fail"])(f"rank {rank} of {start.size} refuses")
        time.sleep(self.facts.get("build_s", 0.0))
        self.schedule = self.facts.get("schedule", "free")
        self.page = ProgressPage(page_fd, start.size)
        self.rank = rank
        self.stats = RunStats()

    def compute(self, sweeps: Iterable[Sequence[AtomicRequest] | None]) -> Iterator[list[AtomicResult]]:
        for requests in sweeps:
            if requests is None:
                continue
            if any(self.facts.get("poison") in request.tokens for request in requests):
                os._exit(9)
            for _ in range(LAYERS):
                time.sleep(self.facts.get("layer_s", 0.0))
                self.page.counts[self.rank] += 1
            self.stats.sweeps += 1
            self.stats.requests += len(requests)
            yield [answer(request) for request in requests]

    def close(self) -> None:
        assert "torch" not in sys.modules


if __name__ == "__main__":
    process.run(FakeEngine)
