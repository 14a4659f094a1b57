"""The engine of a server: requests one by one, routed by the frontend to the worker that is to compute them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import cast

from ..blocks import BlockHasher
from ..config import EngineConfig
from ..core import AtomicRequest, AtomicResult, WorkerState
from ..costmodel import Streaming
from ..errors import Overloaded, RowError, UsageError, WorkerError
from ..frontend import POLICIES, Machine, Ticket, make_policy, make_ticket
from ..machine import estimated_profile, load_profile
from ..messages import Audit, EnginePlan, Message, PoolState, Score, Scored
from ..residency.speed import with_chunks
from .base import ProcessEngine
from .dispatch import Dispatch, Lead
from .group import WorkerGroup
from .watch import Patience


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How requests are given to workers. ``policy``: one of ``frontend.POLICIES``. A sweep takes at most
    ``max_sweep_s`` predicted seconds; one below T waits until its oldest request has waited for ``max_wait_s``. At most
    ``max_queued`` requests wait that no worker has been given. ``lead_s``: a GPU is sent its next sweep when a quarter
    of the one that runs is left, and no longer before its end than this.
    """

    policy: str = "ours"
    max_sweep_s: float | None = None
    max_wait_s: float = 0.0
    max_queued: int = 1 << 17
    lead_s: float = 0.25

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"routing is {self.policy!r}; it must be one of {', '.join(POLICIES)}")


class Reply(Future[AtomicResult]):
    """The answer to one request, or its error. ``started_s``: when its sweep was given to a worker (monotonic clock).
    ``cancel`` takes the request out, unless its sweep was given to a worker already: then it is ``unwanted``, is
    answered when the sweep is done, and is not computed a second time should the worker be lost.
    """

    started_s: float | None = None
    unwanted = False

    def cancel(self) -> bool:
        self.unwanted = True
        return super().cancel()


@dataclass(frozen=True, slots=True)
class _Entry:
    """``patient``: waits outside while the queue is full."""

    ticket: Ticket
    reply: Reply
    patient: bool


class RoutedEngine(ProcessEngine):
    """Implements ``core.ScoringEngine`` with ``config.gpus`` processes and the frontend; may be called by several
    threads.

    Which requests make a sweep depends on when they come, so answers equal those of other engines but for
    floating-point order. UsageError where there is nothing to route (strategies that compute a sweep on all ranks), or
    nothing is known of the device's rates.
    """

    def __init__(
        self,
        config: EngineConfig,
        routing: Routing = Routing(),
        patience: Patience = Patience(),  # noqa: B008 (frozen)
    ) -> None:
        self._routing = routing
        self._hasher = BlockHasher(config.model)
        self._ids = itertools.count()
        self._inbox = SimpleQueue[list[_Entry] | int]()  # requests, or the id of one that was cancelled
        self._replies: dict[int, Reply] = {}  # of everything in the frontend or before it
        self._outside: dict[int, Ticket] = {}  # the patient ones, in order
        self._dispatch: Dispatch | None = None
        self._group: WorkerGroup | None = None
        super().__init__(replace(config, keep_prefixes=True), patience)

    @property
    def machine(self) -> Machine:
        """What the frontend believes of each worker."""
        return self._routes.machine

    @property
    def pace(self) -> float:
        """Seconds that sweeps took, over what was predicted."""
        return self._routes.pace

    def backlog_s(self) -> float:
        """Predicted seconds until everything taken in has been computed."""
        return self.pace * self._routes.frontend.backlog_s()

    def worker_states(self) -> list[WorkerState]:
        """See ``core.ReportingEngine``."""
        return self._routes.states()

    def submit(self, requests: Sequence[AtomicRequest], *, patient: bool = False) -> list[Reply]:
        """Take requests in, together; each gets a reply, from which ``result`` raises RowError (it cannot be computed),
        Overloaded (the queue is full) or WorkerError (the workers cannot be brought back). A ``patient`` one waits for
        room in the queue instead. Callbacks of replies run in the engine's thread and must not block.
        """
        replies, entries = [Reply() for _ in requests], []
        for request, reply in zip(requests, replies, strict=True):
            refusal = self.plan.forming.refusal(request)
            if refusal is not None:
                reply.set_exception(refusal)
            else:
                entries.append(_Entry(self._ticket(request), reply, patient))
        self._inbox.put(entries)
        self._wake_up()
        if self._error is not None or self._closing:  # nobody may be there to read it
            self._refuse_new(self._error or _closed())
        return replies

    def score(self, requests: Sequence[AtomicRequest]) -> list[AtomicResult | Exception]:
        """Answers in the order of the requests. Raises WorkerError when the workers cannot be brought back."""
        replies = self.submit(requests, patient=True)
        try:
            answers = [reply.exception() or reply.result() for reply in replies]
        except BaseException:  # Ctrl-C
            for reply in replies:
                reply.cancel()
            raise
        for answer in answers:
            if isinstance(answer, WorkerError):
                raise answer
        return cast("list[AtomicResult | Exception]", answers)

    def close(self) -> None:
        super().close()
        self._refuse(_closed())

    def _ticket(self, request: AtomicRequest) -> Ticket:
        longest = self.plan.forming.private_beyond
        return make_ticket(
            request,
            self._hasher,
            id=next(self._ids),
            vocab_size=self.limits.vocab_size,
            private=longest is not None and len(request.tokens) > longest,
            arrival_s=time.monotonic(),
        )

    # Everything below runs in the thread that owns the processes and the frontend.

    @property
    def _routes(self) -> Dispatch:
        assert self._dispatch is not None
        return self._dispatch

    @property
    def _idle(self) -> bool:
        return self._dispatch is None or (self._dispatch.idle and not self._outside)

    def _busy(self) -> list[bool]:
        return self._routes.busy()

    def _planned(self, plan: EnginePlan) -> None:
        machine = _machine(plan, self._config, self._routing, self.size)
        policy = make_policy(self._routing.policy, machine.costs, machine.limits)
        # On a CPU a sweep's results come when the next one is done, if there is one.
        depth = 1 if machine.profile.gpu == "cpu" else 2
        lead = Lead(depth=depth, seconds=self._routing.lead_s)
        self._dispatch = Dispatch(machine, policy, self.size, plan.schedule, lead)

    def _joined(self, generation: int, group: WorkerGroup) -> None:
        self._group = group
        self._routes.joined(generation, group.page.read())

    def _give(self) -> Iterator[tuple[int, Score]]:
        assert self._group is not None
        now_s = time.monotonic()
        self._admit()
        for rank, score, tickets in self._routes.give(now_s, self._group.page.read()):
            self._started(tickets, now_s)
            yield rank, score
        for rank in self._routes.to_audit():
            self._group.send(rank, Audit())

    def _done(self, rank: int, scored: Scored) -> Callable[[], None] | None:
        events = None if scored.events is None else scored.events.unpack()
        tickets = self._routes.done(rank, scored.number, scored.stats, events)
        if tickets is None:
            return None
        replies = [self._replies.pop(ticket.id, None) for ticket in tickets]
        results = scored.results.unpack()

        def tell() -> None:
            for reply, result in zip(replies, results, strict=True):
                if reply is not None:  # it was cancelled while its sweep was formed
                    _resolve(reply, result)

        return tell

    def _attend(self, group: WorkerGroup, rank: int, message: Message) -> None:
        if isinstance(message, PoolState):
            self._routes.audited(rank, message.events.unpack())
        else:
            super()._attend(group, rank, message)

    def _wait_s(self) -> float | None:
        return self._routes.wait_s(time.monotonic())

    def _take_back(self) -> int:
        again = 0 if self._dispatch is None else self._dispatch.lost()
        for id, reply in list(self._replies.items()):
            if reply.unwanted and reply.running():
                self._routes.frontend.cancel(id)
                _resolve(self._replies.pop(id), CancelledError())
        return again

    def _refuse(self, error: Exception) -> None:
        while self._replies:
            _resolve(self._replies.popitem()[1], error)
        self._refuse_new(error)

    def _refuse_new(self, error: Exception) -> None:
        """Answer what was not taken in; any thread may do it."""
        with contextlib.suppress(Empty):
            while True:
                came = self._inbox.get_nowait()
                for entry in () if isinstance(came, int) else came:
                    _resolve(entry.reply, error)

    def _started(self, tickets: Sequence[Ticket], now_s: float) -> None:
        """These are being computed, some of them for a second time: they cannot be cancelled any more."""
        for ticket in tickets:
            reply = self._replies.get(ticket.id)
            if reply is not None and (reply.running() or reply.set_running_or_notify_cancel()):
                reply.started_s = reply.started_s or now_s

    def _admit(self) -> None:
        """Take in what has come, and those who wait outside while there is room."""
        while not self._inbox.empty():
            came = self._inbox.get()
            if isinstance(came, int):
                if self._replies.pop(came, None) is not None and self._outside.pop(came, None) is None:
                    self._routes.frontend.cancel(came)
                continue
            for entry in came:
                self._enter(entry)
        frontend = self._routes.frontend
        while self._outside and frontend.queued < frontend.admission.max_queued:
            self._submit(self._outside.pop(next(iter(self._outside))))

    def _enter(self, entry: _Entry) -> None:
        id = entry.ticket.id
        self._replies[id] = entry.reply
        if entry.patient:
            self._outside[id] = entry.ticket
        else:
            self._submit(entry.ticket)
        entry.reply.add_done_callback(lambda reply: self._forget(id) if reply.cancelled() else None)

    def _forget(self, id: int) -> None:
        """Any thread: nobody waits for a request any more."""
        self._inbox.put(id)
        self._wake_up()

    def _submit(self, ticket: Ticket) -> None:
        try:
            self._routes.frontend.submit(ticket)
        except (RowError, Overloaded) as error:
            _resolve(self._replies.pop(ticket.id), error)


def _machine(plan: EnginePlan, config: EngineConfig, routing: Routing, ranks: int) -> Machine:
    """What every worker is, from what it says of itself and the rates of its device."""
    facts = plan.facts
    if facts is None or plan.schedule == "together":
        raise UsageError(f"--strategy {config.strategy} computes every sweep on all GPUs: there is nothing to route")
    try:
        known = load_profile(config.profile, gpu=facts.device) if config.profile else estimated_profile(facts.device)
    except UsageError as error:
        raise UsageError(f"{error}; in serve, --routing off needs no rates") from None
    profile = known if plan.limits.chunk_rows is None else with_chunks(known, plan.limits.chunk_rows)
    return Machine.planned(
        spec=facts.spec,
        profile=profile,
        precision=facts.precision,
        streaming=Streaming(
            levels=facts.levels,
            bank_bytes=facts.bank_bytes,
            depth=max(1, facts.bank_buffers),
            ranks=ranks,
            peer=config.transport,
        ),
        sweep_tokens=plan.limits.max_sweep_tokens,
        max_request_tokens=plan.limits.max_request_tokens,
        kv_blocks=facts.kv_blocks,
        rule=plan.forming.rule,
        max_sweep_s=routing.max_sweep_s,
        max_wait_s=routing.max_wait_s,
        max_queued=routing.max_queued,
    )


def _resolve(reply: Reply, outcome: AtomicResult | Exception) -> None:
    """Answer, unless nobody waits any more."""
    if not reply.running() and not reply.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        reply.set_exception(outcome)
    else:
        reply.set_result(outcome)


def _closed() -> WorkerError:
    return WorkerError("the engine was closed before this request was answered")
