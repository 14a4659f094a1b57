"""Waiting work of one lane: the oldest first, and between tenants a fair share of the engine's tokens."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np

from ..core import AtomicRequest
from ..forest import common_prefixes, sort_requests
from .backends import Answers

_MISSING = LookupError("not answered")


@dataclass(eq=False, slots=True, kw_only=True)
class Work:
    """The atomic requests of one HTTP request or batch line, and the place for their answers.

    ``costs`` are the tokens that each request adds to those before it, prefixes shared. The queue advances ``given``,
    the scheduler fills ``answers``, of which ``unanswered`` are missing, and resolves ``reply`` exactly once. Who no
    longer waits cancels ``reply``.
    """

    requests: Sequence[AtomicRequest]
    costs: Sequence[int]
    tenant: str = ""
    arrived_s: float = 0.0
    started_s: float | None = None  # of the first call that carries part of it
    given: int = 0
    answers: Answers = field(init=False)
    unanswered: int = field(init=False)
    reply: Future[Answers] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.unanswered = len(self.requests)
        self.answers = [_MISSING] * self.unanswered

    @property
    def tokens(self) -> int:
        return sum(self.costs)

    def resolve(self, outcome: Answers | Exception) -> None:
        """Reply, unless nobody waits any more. Called once."""
        if not self.reply.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.reply.set_exception(outcome)
        else:
            self.reply.set_result(outcome)


def make_work(requests: Sequence[AtomicRequest], tenant: str = "") -> tuple[Work, list[int]]:
    """Work in the order in which prefixes are shared, and where in it each of ``requests`` went."""
    sequences = [request.tokens for request in requests]
    order = sort_requests(sequences, [request.salt for request in requests]) if len(requests) > 1 else [0]
    shared = common_prefixes(sequences, order) if len(requests) > 1 else [0]
    costs = [max(1, len(sequences[index]) - prefix) for index, prefix in zip(order, shared, strict=True)]
    places = np.argsort(np.asarray(order)).tolist()
    return Work(requests=[requests[index] for index in order], costs=costs, tenant=tenant), places


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Requests ``start`` to ``end`` of one work: what one call of the engine carries of it."""

    work: Work
    start: int
    end: int

    @property
    def requests(self) -> Sequence[AtomicRequest]:
        return self.work.requests[self.start : self.end]

    @property
    def reply(self) -> Future[Answers]:
        return self.work.reply

    @property
    def tokens(self) -> int:
        return sum(self.work.costs[self.start : self.end])

    def computed_tokens(self, answers: Answers) -> int:
        """``tokens`` of the requests that were not withdrawn."""
        costs = self.work.costs[self.start : self.end]
        pairs = zip(costs, answers, strict=True)
        return sum(cost for cost, answer in pairs if not isinstance(answer, CancelledError))

    def fill(self, answers: Answers) -> bool:
        """Put the answers in their places, in whatever order the parts of a work are done; True: it was the last."""
        assert len(answers) == self.end - self.start, (len(answers), self.start, self.end)
        self.work.answers[self.start : self.end] = answers
        self.work.unanswered -= len(answers)
        return not self.work.unanswered


class FairQueue:
    """Start-time fair queueing: work is tagged with its tenant's share so far, and the smallest tag goes first.

    With one tenant that is the order of arrival. A tenant that comes back after a pause starts at the present, so it
    saves nothing up. Not thread-safe: the scheduler holds its lock.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Work]] = []
        self._count = itertools.count()
        self._now = 0.0  # the tag of what was taken last
        self._next_tag: dict[str, float] = {}
        self.tokens = 0
        self.tenant_tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def oldest_s(self) -> float:
        """When the work that waits longest arrived."""
        return min(work.arrived_s for _, _, work in self._heap)

    def push(self, work: Work) -> None:
        tag = max(self._now, self._next_tag.get(work.tenant, 0.0))
        tokens = work.tokens
        self._next_tag[work.tenant] = tag + tokens
        heapq.heappush(self._heap, (tag, next(self._count), work))
        self._add(work.tenant, tokens)

    def take(self, max_tokens: float) -> list[Part]:
        """Work of at most ``max_tokens``, or one request where even the first is larger; not what was cancelled."""
        parts: list[Part] = []
        left = max_tokens
        while self._heap:
            tag, _, work = self._heap[0]
            if work.reply.cancelled():
                self._pop(tag)
                self._add(work.tenant, -sum(work.costs[work.given :]))
                continue
            end = work.given
            while end < len(work.costs) and (work.costs[end] <= left or not (parts or end > work.given)):
                left -= work.costs[end]
                end += 1
            if end == work.given:
                break
            parts.append(Part(work, work.given, end))
            self._add(work.tenant, -sum(work.costs[work.given : end]))
            work.given = end
            if end < len(work.costs):
                break
            self._pop(tag)
        return parts

    def drop_cancelled(self) -> None:
        """Take out what nobody waits for."""
        gone = [work for _, _, work in self._heap if work.reply.cancelled()]
        if not gone:
            return
        self._heap = [entry for entry in self._heap if not entry[2].reply.cancelled()]
        heapq.heapify(self._heap)
        for work in gone:
            self._add(work.tenant, -sum(work.costs[work.given :]))
        self._start_anew()

    def drain(self) -> list[Work]:
        """Take everything out, unanswered."""
        works = [work for _, _, work in sorted(self._heap, key=lambda entry: entry[:2])]
        self._heap.clear()
        self._next_tag.clear()
        self.tenant_tokens.clear()
        self.tokens = 0
        return works

    def _pop(self, tag: float) -> None:
        heapq.heappop(self._heap)
        self._now = max(self._now, tag)
        self._start_anew()

    def _start_anew(self) -> None:
        if not self._heap:  # tags only compare those who wait
            self._next_tag.clear()
            self._now = 0.0

    def _add(self, tenant: str, tokens: int) -> None:
        self.tokens += tokens
        left = self.tenant_tokens.get(tenant, 0) + tokens
        if left:
            self.tenant_tokens[tenant] = left
        else:
            self.tenant_tokens.pop(tenant, None)
