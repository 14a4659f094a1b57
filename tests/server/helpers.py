"""A deterministic engine without a model, a clock that stands still, and a server on a local port."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import uvicorn

from moe_prefill.core import AtomicRequest, AtomicResult, EngineLimits, RunStats
from moe_prefill.errors import RowError
from moe_prefill.server.app import HttpLimits, make_app
from moe_prefill.server.keys import Keys
from moe_prefill.server.metrics import Metrics
from moe_prefill.server.service import Service
from moe_prefill.server.tracing import NoTracer, Tracer

VOCAB = 512


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeEngine:
    """Logits are a function of position, token and id. ``gate`` holds every call up until it is opened."""

    def __init__(
        self,
        *,
        max_request: int = 4096,
        max_sweep: int = 8192,
        clock: Clock | None = None,
        tokens_per_s: float = 1000.0,
        vocab_size: int = VOCAB,
    ) -> None:
        self.limits = EngineLimits(max_request_tokens=max_request, max_sweep_tokens=max_sweep, vocab_size=vocab_size)
        self.stats = RunStats()
        self.plan_digest = "plan"
        self.peak_flops: float | None = 1e12
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[list[AtomicRequest]] = []
        self.fail_with: Exception | None = None
        self._clock = clock
        self._tokens_per_s = tokens_per_s

    def score(self, requests: Sequence[AtomicRequest]) -> list[AtomicResult | Exception]:
        self.calls.append(list(requests))
        assert self.gate.wait(60)
        if self.fail_with is not None:
            raise self.fail_with
        tokens = sum(len(request.tokens) for request in requests)
        if self._clock is not None:
            self._clock.now_s += tokens / self._tokens_per_s
        self.stats.sweeps += 1
        self.stats.requests += len(requests)
        self.stats.prompt_tokens += tokens
        self.stats.computed_tokens += tokens
        return [self._one(request) for request in requests]

    def _one(self, request: AtomicRequest) -> AtomicResult | Exception:
        if len(request.tokens) > self.limits.max_request_tokens:
            return RowError("too_long", "too long")
        counts = np.diff(request.id_offsets)
        places = np.repeat(request.positions, counts)
        logits = _logits(places, request.tokens[places], request.ids)
        if not request.vocabulary:
            return AtomicResult(logits)
        ids = np.arange(self.limits.vocab_size)
        rows = np.stack(
            [_logits(np.full_like(ids, at), np.full_like(ids, request.tokens[at]), ids) for at in request.positions]
        )
        log_z = np.logaddexp.reduce(rows, axis=1)
        if not request.top_k:
            return AtomicResult(logits, log_z)
        top = np.argsort(-rows, axis=1, kind="stable")[:, : request.top_k].astype(np.int32)
        return AtomicResult(logits, log_z, top, np.take_along_axis(rows, top, axis=1) - log_z[:, None])

    def close(self) -> None:
        pass


def _logits(places: np.ndarray, tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Float32, distinct for distinct ids after one token."""
    mixed = (
        places.astype(np.int64) * 7919 + tokens.astype(np.int64) * 104729 + ids.astype(np.int64) * 15485863
    ) % 100003
    return (mixed / 10000).astype(np.float32)


def request(num_tokens: int, seed: int = 0, salt: str = "") -> AtomicRequest:
    tokens = np.random.default_rng((seed, num_tokens)).integers(0, VOCAB, num_tokens)
    return AtomicRequest.candidates(tokens, [1, 2], salt=salt)


@contextlib.contextmanager
def running(command: Sequence[str], directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server as a process of its own, which writes its log into ``directory``; its base URL."""
    log = directory / f"log{len(list(directory.iterdir()))}"
    with log.open("w") as file:
        process = subprocess.Popen(list(command), stderr=file)
    try:
        while "running on http" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        told = next(line for line in log.read_text().splitlines() if "running on http" in line)
        yield process, json.loads(told)["message"].split()[2]
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def listening(
    service: Service, keys: Keys | None = None, limits: HttpLimits | None = None, tracer: Tracer | None = None
) -> Iterator[str]:
    """The base URL of a server that runs in a thread, its scheduler started."""
    metrics = Metrics(service.scheduler)
    app = make_app(service, metrics, keys, limits or HttpLimits(), tracer or NoTracer())
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(app, log_level="error", http="h11", ws="none", lifespan="off", proxy_headers=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        if service.scheduler.state == "starting":
            service.scheduler.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(20)
