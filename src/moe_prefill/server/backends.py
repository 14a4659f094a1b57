"""The engine as the scheduler needs it: parts of a call in, each part's answers out. Kinds of engines plug in here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from queue import SimpleQueue
from typing import Any, Protocol, runtime_checkable

from ..core import AtomicRequest, AtomicResult, ScoringEngine, StartingEngine
from ..errors import WorkerError

Answers = list[AtomicResult | Exception]
_FILLED = 0.95  # of a sweep; the rest is for prefixes that are counted once and too short to be computed once


class Asked(Protocol):
    """One part of a call. ``reply`` is done before the part is answered where nobody waits for it any more."""

    @property
    def requests(self) -> Sequence[AtomicRequest]: ...

    @property
    def reply(self) -> Future[Any]: ...


class Backend(Protocol):
    """``calls_at_once``: how many calls may be inside ``compute`` at a time, each in a thread of its own."""

    @property
    def calls_at_once(self) -> int: ...

    def fitting(self, max_tokens: float) -> float:
        """Tokens of the call of at most ``max_tokens`` that wastes least."""
        ...

    def compute(self, parts: Sequence[Asked]) -> Iterator[tuple[int, Answers]]:
        """Each part's number and its answers, in any order; CancelledError for a request that was withdrawn because
        nobody waits for it. Raises WorkerError when the engine is lost.
        """
        ...


class Lists:
    """An engine of lists: all parts are answered together, and nothing is withdrawn.

    A list is cut into sweeps of near-equal size, so one that is a little longer than a sweep becomes two halves.
    """

    def __init__(self, engine: ScoringEngine, calls_at_once: int) -> None:
        self._engine = engine
        self.calls_at_once = calls_at_once

    def fitting(self, max_tokens: float) -> float:
        sweep = _FILLED * self._engine.limits.max_sweep_tokens
        return max_tokens // sweep * sweep or max_tokens

    def compute(self, parts: Sequence[Asked]) -> Iterator[tuple[int, Answers]]:
        sizes = [len(part.requests) for part in parts]
        answers = self._engine.score([request for part in parts for request in part.requests])
        assert len(answers) == sum(sizes), (len(answers), sizes)
        start = 0
        for number, size in enumerate(sizes):
            yield number, answers[start : start + size]
            start += size


@runtime_checkable
class RoutingEngine(Protocol):
    """An engine that routes requests one by one; ``patient`` ones wait for room in its queue. Callbacks of the futures
    run in the engine's thread. Cancelling a future withdraws its request unless that is being computed.
    """

    def submit(self, requests: Sequence[AtomicRequest], *, patient: bool) -> Sequence[Future[AtomicResult]]: ...


class Routed:
    """An engine that routes: a part is answered when its own requests are, whatever the others take, and withdrawn
    when nobody waits for it any more.
    """

    calls_at_once = 2  # the second is routed while the first is computed

    def __init__(self, engine: RoutingEngine) -> None:
        self._engine = engine

    def fitting(self, max_tokens: float) -> float:
        return max_tokens

    def compute(self, parts: Sequence[Asked]) -> Iterator[tuple[int, Answers]]:
        finished = SimpleQueue[int]()
        replies = [self._engine.submit(part.requests, patient=True) for part in parts]
        for part, mine in zip(parts, replies, strict=True):
            part.reply.add_done_callback(lambda _, mine=mine: _withdraw(mine))  # type: ignore[misc]
        for number, mine in enumerate(replies):
            for reply in mine:
                reply.add_done_callback(lambda _, number=number: finished.put(number))  # type: ignore[misc]
        left = [len(mine) for mine in replies]
        for _ in range(sum(left)):
            number = finished.get()
            left[number] -= 1
            if not left[number]:
                yield number, [_outcome(reply) for reply in replies[number]]


def backend_of(engine: ScoringEngine) -> Backend:
    """Engines that can begin a list while another one is computed are given two."""
    if isinstance(engine, RoutingEngine):
        return Routed(engine)
    return Lists(engine, 2 if isinstance(engine, StartingEngine) else 1)


def _withdraw(replies: Sequence[Future[AtomicResult]]) -> None:
    """Nobody waits for these; those that are answered already stay so."""
    for reply in replies:
        reply.cancel()


def _outcome(reply: Future[AtomicResult]) -> AtomicResult | Exception:
    """Raises WorkerError, which is no request's own."""
    if reply.cancelled():
        return CancelledError()
    error = reply.exception()
    if error is None:
        return reply.result()
    if isinstance(error, WorkerError) or not isinstance(error, Exception):
        raise error
    return error
