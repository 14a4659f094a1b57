"""A model whose next-token logits are drawn from its prefix: cheap, deterministic, and different after every prefix."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from moe_prefill.core import AtomicRequest, AtomicResult, EngineLimits
from moe_prefill.tasks import Task

VOCAB = 430
LIMITS = EngineLimits(max_request_tokens=200, max_sweep_tokens=10_000, vocab_size=VOCAB)
WIDE = EngineLimits(max_request_tokens=4096, max_sweep_tokens=8192, vocab_size=210_000)


def logits_after(prefix: Sequence[int]) -> np.ndarray:
    """Float32 [VOCAB]."""
    seed = zlib.crc32(np.asarray(prefix, dtype=np.int32).tobytes())
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 3


def logprob(prefix: Sequence[int], continuation: Sequence[int]) -> float:
    """The sum of log-probabilities of a continuation, token by token."""
    total, prefix = 0.0, list(prefix)
    for token in continuation:
        row = logits_after(prefix).astype(np.float64)
        total += row[token] - np.logaddexp.reduce(row)
        prefix.append(token)
    return total


def answer(request: AtomicRequest) -> AtomicResult:
    rows = np.stack([logits_after(request.tokens[: at + 1]) for at in request.positions])
    counts = np.diff(request.id_offsets)
    logits = rows[np.repeat(np.arange(len(rows)), counts), request.ids]
    if not request.vocabulary:
        return AtomicResult(logits)
    log_z = np.logaddexp.reduce(rows, axis=1)
    if not request.top_k:
        return AtomicResult(logits, log_z)
    top = np.argsort(-rows, axis=1, kind="stable")[:, : request.top_k].astype(np.int32)
    return AtomicResult(logits, log_z, top, np.take_along_axis(rows, top, axis=1) - log_z[:, None])


def run(task: Task, *rows: dict[str, object]) -> list[dict[str, object] | str]:
    """Values of every row, or the code of its error."""
    answers: list[dict[str, object] | str] = []
    for prepared in task.prepare(rows):
        if isinstance(prepared, Exception):
            answers.append(prepared.code)
            continue
        values = task.finish(prepared, [answer(request) for request in prepared.requests])
        assert list(values) == [column.name for column in task.columns]
        answers.append(values)
    return answers
