"""A worker process whose engine has no weights and no torch: answers are a function of the tokens, layers are pauses.

The settings of a run are in the config's ``model``, a JSON object: ``build_s``, ``layer_s``, ``fail`` (raise that error
while building), ``schedule``, ``poison`` (the process dies of a request with this token), ``kv_blocks``
(of a pool that is kept and never read), ``exposed`` (part of a sweep's time that it says it waited for banks).
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from moe_prefill import errors
from moe_prefill.blocks import BlockEvents, BlockPool, HashedSweep
from moe_prefill.core import AtomicRequest, AtomicResult, EngineLimits, RunStats
from moe_prefill.forest import SHARE_EVERYTHING
from moe_prefill.forming import Forming
from moe_prefill.messages import Start
from moe_prefill.workers import process
from moe_prefill.workers.page import ProgressPage
from tests.costmodel.models import model_spec

LAYERS = 3
FLOPS = 10**6  # of a token, by what the fake says
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
    device_kind = "cpu"
    spec = model_spec()
    residency = SimpleNamespace(levels=("resident",) * LAYERS, bank_dtype="float32", bank_bytes=0, bank_buffers=0)

    def __init__(self, start: Start, rank: int, page_fd: int, store_fd: int) -> None:
        self.facts = json.loads(start.config.model)
        if "fail" in self.facts:
            raise getattr(errors, self.facts["fail"])(f"rank {rank} of {start.size} refuses")
        time.sleep(self.facts.get("build_s", 0.0))
        self.schedule = self.facts.get("schedule", "free")
        self.page = ProgressPage(page_fd, start.size)
        self.rank = rank
        self.stats = RunStats()
        self.kv_blocks = self.facts.get("kv_blocks", 0)
        self.pool = BlockPool(rank, self.kv_blocks)

    def take_events(self) -> BlockEvents | None:
        return self.pool.take_events() if self.kv_blocks else None

    def snapshot(self) -> BlockEvents | None:
        return self.pool.snapshot() if self.kv_blocks else None

    def compute(self, sweeps: Iterable[Sequence[AtomicRequest] | None]) -> Iterator[list[AtomicResult]]:
        for requests in sweeps:
            if requests is None:
                continue
            if any(self.facts.get("poison") in request.tokens for request in requests):
                os._exit(9)
            for _ in range(LAYERS):
                time.sleep(self.facts.get("layer_s", 0.0))
                self.page.counts[self.rank] += 1
            if isinstance(requests, HashedSweep):
                self.pool.store(requests.chains, requests.shared)
            self.count(requests)
            yield [answer(request) for request in requests]

    def count(self, requests: Sequence[AtomicRequest]) -> None:
        seconds = LAYERS * self.facts.get("layer_s", 0.0)
        self.stats.sweeps += 1
        self.stats.requests += len(requests)
        self.stats.flops += self.facts.get("flops", FLOPS) * sum(len(request.tokens) for request in requests)
        self.stats.busy_s += seconds
        self.stats.exposed_s += self.facts.get("exposed", 0.0) * seconds

    def close(self) -> None:
        assert "torch" not in sys.modules


if __name__ == "__main__":
    process.run(FakeEngine)
