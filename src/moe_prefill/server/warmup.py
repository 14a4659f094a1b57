"""Work before the first request: what could run out of memory does so at the start, and the engine's pace is known."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection

import numpy as np

from ..core import NOT_KEPT, AtomicRequest, ScoringEngine
from ..errors import PlanError
from .pace import Pace
from .settings import Warmup

_SMALL = 64  # tokens
_ROW = 512  # tokens of a row where a call is filled with them
_ROUNDS = 4  # in which the size of calls settles: the first estimates come from small calls


def warm_up(engine: ScoringEngine, paces: Collection[Pace], mode: Warmup) -> None:
    """Compute a small call, and with "limit" the longest request and calls as large as calls will be.

    Raises PlanError when a request fails: nothing that clients send would succeed.
    """
    if mode == "off":
        return
    limits = engine.limits
    small = min(_SMALL, limits.max_request_tokens)
    _compute(engine, [small])  # the first call also compiles and allocates
    fixed_s = min(_compute(engine, [small]) for _ in range(3))  # the least: one may have been held up
    seconds = _compute(engine, [small] * 8)
    for pace in paces:
        pace.fixed_s = fixed_s
        pace.add(small * 8, seconds)
    if mode == "limit":
        _compute(engine, [limits.max_request_tokens])
        row = min(_ROW, limits.max_request_tokens)
        for pace in paces:
            for _ in range(_ROUNDS):
                rows = max(1, int((pace.call_tokens or 0) / row))
                pace.add(rows * row, _compute(engine, [row] * rows))


def keep_heap() -> None:
    """Modules, tokenizer and engine stay as long as the process. Full collections, which stop all threads, pass them
    over from now on.
    """
    gc.collect()
    gc.freeze()


def _compute(engine: ScoringEngine, lengths: list[int]) -> float:
    """Seconds of one call."""
    draw = np.random.default_rng(len(lengths))
    vocab_size = engine.limits.vocab_size
    requests = [
        AtomicRequest.candidates(draw.integers(0, vocab_size, length), [0], vocabulary=True, salt=NOT_KEPT)
        for length in lengths
    ]
    begin_s = time.monotonic()
    for answer in engine.score(requests):
        if isinstance(answer, Exception):
            raise PlanError(f"the warm-up failed with requests of {max(lengths)} tokens: {answer}") from answer
    return time.monotonic() - begin_s
