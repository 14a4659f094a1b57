"""Work before the first request: what could run out of memory does so at the start, and the engine's pace is known."""

from __future__ import annotations

import time

import numpy as np

from ..core import AtomicRequest, ScoringEngine
from ..errors import PlanError
from .scheduler import Pace
from .settings import Warmup

_SMALL = 64  # tokens
_ROW = 512  # tokens of a row where a call is filled with them


def warm_up(engine: ScoringEngine, pace: Pace, mode: Warmup, max_sweep_s: float) -> None:
    """Compute a small call, and with "limit" the longest request and a call as large as calls will be.

    Raises PlanError when a request fails: nothing that clients send would succeed.
    """
    if mode == "off":
        return
    limits = engine.limits
    small = min(_SMALL, limits.max_request_tokens)
    for _ in range(2):  # the first call also compiles and allocates
        _compute(engine, pace, [small], measure=False)
    _compute(engine, pace, [small] * 8, measure=True)
    if mode == "limit":
        _compute(engine, pace, [limits.max_request_tokens], measure=True)
        row = min(_ROW, limits.max_request_tokens)
        tokens = (pace.tokens_per_s or 0.0) * max_sweep_s
        _compute(engine, pace, [row] * max(1, int(tokens / row)), measure=True)


def _compute(engine: ScoringEngine, pace: Pace, lengths: list[int], *, measure: bool) -> None:
    draw = np.random.default_rng(len(lengths))
    vocab_size = engine.limits.vocab_size
    requests = [
        AtomicRequest.candidates(draw.integers(0, vocab_size, length), [0], vocabulary=True) for length in lengths
    ]
    begin_s = time.monotonic()
    for answer in engine.score(requests):
        if isinstance(answer, Exception):
            raise PlanError(f"the warm-up failed with requests of {max(lengths)} tokens: {answer}") from answer
    if measure:
        pace.add(sum(lengths), time.monotonic() - begin_s)
