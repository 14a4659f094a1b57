"""A deterministic engine and task without a model: answers are hashes of the tokens."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence

import numpy as np

from moe_prefill.core import AtomicRequest, AtomicResult, Column, EngineLimits, PreparedRow, RunStats
from moe_prefill.errors import RowError


class FakeEngine:
    """Logits are a hash of the tokens; a request longer than the limit gets its RowError."""

    def __init__(
        self, *, plan: str = "plan-a", max_request: int = 64, max_sweep: int = 4096, pause_s: float = 0.0
    ) -> None:
        self.limits = EngineLimits(max_request_tokens=max_request, max_sweep_tokens=max_sweep, vocab_size=512)
        self.stats = RunStats()
        self.plan_digest = plan
        self.peak_flops: float | None = 1e12
        self.calls: list[int] = []
        self._pause_s = pause_s

    def score(self, requests: Sequence[AtomicRequest]) -> list[AtomicResult | Exception]:
        time.sleep(self._pause_s)
        self.calls.append(len(requests))
        self.stats.sweeps += 1
        self.stats.requests += len(requests)
        self.stats.busy_s += 0.001
        for request in requests:
            self.stats.prompt_tokens += len(request.tokens)
            self.stats.computed_tokens += len(request.tokens)
            self.stats.flops += 1000 * len(request.tokens)
        return [self._one(request) for request in requests]

    def _one(self, request: AtomicRequest) -> AtomicResult | Exception:
        if len(request.tokens) > self.limits.max_request_tokens:
            return RowError("too_long", f"{len(request.tokens)} tokens, the limit is {self.limits.max_request_tokens}")
        seed = hashlib.sha256(request.tokens.tobytes()).digest()
        values = [seed[i % 32] / 16 + int(token) % 7 for i, token in enumerate(request.ids)]
        log_z = np.full(len(request.positions), 30, np.float32) if request.vocabulary else None
        return AtomicResult(np.array(values, np.float32), log_z)

    def close(self) -> None:
        pass


class FakeTask:
    """Bytes of the text are the tokens. Adds one column of every common kind."""

    name = "classify"
    placeholders = frozenset({"text"})
    answer_column = "label"
    columns = (
        Column(name="label", kind="string"),
        Column(name="probability", kind="float"),
        Column(name="probabilities", kind="float_map"),
        Column(name="ranking", kind="strings"),
        Column(name="detail", kind="json"),
    )
    labels = ("ham", "spam")

    def __init__(self, digest: str = "task-a") -> None:
        self.digest = digest

    def prepare(self, rows: Sequence[Mapping[str, object]]) -> list[PreparedRow | RowError]:
        return [self._row(row["text"]) for row in rows]

    def _row(self, text: object) -> PreparedRow | RowError:
        if not text:
            return RowError("empty_text", "the column 'text' is empty")
        tokens = np.frombuffer(str(text).encode(), np.uint8)
        notes = ("long",) if len(tokens) > 20 else ()
        return PreparedRow(
            (AtomicRequest.candidates(tokens, [3, 5]), AtomicRequest.candidates(tokens, [4])), text, notes
        )

    def finish(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> dict[str, object]:
        assert len(results) == 2
        scores = np.exp(results[0].logits.astype(np.float64))
        shares = [float(x) for x in scores / scores.sum()]
        best = self.labels[int(np.argmax(shares))]
        return {
            "label": best,
            "probability": max(shares),
            "probabilities": dict(zip(self.labels, shares, strict=True)),
            "ranking": sorted(self.labels, key=lambda name: -shares[self.labels.index(name)]),
            "detail": {"text": prepared.state, "other": float(results[1].logits[0])},
        }

    def notes(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> tuple[str, ...]:
        return ("even",) if len(prepared.requests[0].tokens) % 2 == 0 else ()
