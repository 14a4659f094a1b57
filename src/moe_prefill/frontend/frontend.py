"""The frontend: takes requests in, decides which worker computes what and when, and keeps the books.

It knows no process, socket or clock: times are arguments, and what happens on the workers arrives as calls. One thread
owns it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..blocks import BLOCK_TOKENS, BlockEvents, Chain, held_blocks, kept_blocks
from ..errors import Overloaded, RowError
from .costs import RequestCosts
from .former import FormedSweep, SweepBounds, WaitingRoom
from .load import Load
from .policies import Limits, Policy
from .ticket import Ticket
from .worker import Worker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """``max_request_tokens``: the longest request that a worker can compute. ``max_queued``: requests that no worker
    has been given.
    """

    max_request_tokens: int
    max_queued: int = 1 << 17


class Frontend:
    """Router, tables, waiting rooms and sweeps of ``num_workers`` workers."""

    def __init__(
        self, num_workers: int, policy: Policy, costs: RequestCosts, bounds: SweepBounds, admission: Admission
    ) -> None:
        self.workers = [Worker(index) for index in range(num_workers)]
        self.policy, self.costs, self.bounds, self.admission = policy, costs, bounds, admission
        self._alive = list(self.workers)
        self._worker_of_sweep: dict[int, Worker] = {}
        self._tickets: dict[int, Ticket] = {}  # given to a worker and not finished
        self._stored: dict[int, int] = {}  # blocks that the pool will have, by request of a sweep that was formed
        self._cancelled: set[int] = set()  # of the queue
        self._next_sweep = 0

    @property
    def queued(self) -> int:
        """Requests that no worker has been given."""
        return len(self.policy.queue)

    @property
    def idle(self) -> bool:
        return not self._tickets and not self.queued

    def backlog_s(self) -> float:
        """Predicted seconds until everything taken in has been computed, spread over the workers that live."""
        backlog_ns = sum(w.load.ns for w in self._alive) + self.policy.queue.remaining_ns
        return backlog_ns / 1e9 / max(1, len(self._alive))

    def submit(self, ticket: Ticket) -> None:
        """Take a request in. RowError ``too_long``: it fits no worker. Overloaded: the queue is full."""
        longest = min(self.admission.max_request_tokens, self.bounds.max_tokens)
        if ticket.num_tokens > longest:
            raise RowError(
                "too_long",
                f"the request has {ticket.num_tokens} tokens; no worker can compute more than {longest} (the smaller "
                f"of the model's context and the sweep of {self.bounds.max_tokens} tokens that memory allows)",
            )
        if self.queued >= self.admission.max_queued:
            wait_s = self.backlog_s()
            raise Overloaded(
                f"{self.queued} requests are queued, as many as may be; they will take about {wait_s:.1f} s; try again "
                "then, or start the server with a longer queue or more GPUs",
                retry_after_s=wait_s,
            )
        self.policy.queue.push(ticket)

    def route(self) -> int:
        """One round: give out what the policy lets go; returns how many requests."""
        queue, given = self.policy.queue, 0
        while len(queue) and self._alive:
            ticket = queue.peek(self._alive)
            if ticket.id in self._cancelled:
                self._cancelled.remove(queue.pop().id)
                continue
            worker = self.policy.choose(ticket, self._alive)
            if worker is None:
                break
            self._give(queue.pop(), worker)
            given += 1
        return given

    def cancel(self, id: int) -> None:
        """Nobody waits for an unfinished request any more: it is forgotten, unless its sweep runs already."""
        ticket = self._tickets.get(id)
        if ticket is None:
            self._cancelled.add(id)
            return
        worker = next(worker for worker in self.workers if worker.load.has(id))
        if worker.waiting.remove(ticket):
            worker.load.cancel(id)
            worker.table.forget(ticket.chain)
            del self._tickets[id]

    def saturate(self, limits: Limits) -> None:
        """T is another one from now on."""
        self.bounds = replace(self.bounds, least_flops=limits.saturated)
        self.policy.limit(limits)

    def next_sweep(self, index: int, now_s: float) -> FormedSweep | None:
        """The sweep that worker ``index`` is to compute next; None: nothing waits, or not enough for not long enough
        (ask again at ``wakes_at``).
        """
        worker = self.workers[index]
        if not len(worker.waiting) or not worker.alive or now_s < self.wakes_at(index):
            return None
        tickets, forest = worker.waiting.take(self.bounds, self.costs)
        number = self._next_sweep
        self._next_sweep += 1
        worker.load.start(number, [ticket.id for ticket in tickets])
        self._worker_of_sweep[number] = worker
        shared = [worker.table.wanted_by_others(ticket.chain) for ticket in tickets]
        self._promise_less(worker, tickets, shared)
        return FormedSweep(number=number, tickets=tickets, shared_blocks=shared, forest=forest)

    def wakes_at(self, index: int) -> float:
        """When what waits for a worker becomes a sweep though it stays below T."""
        worker = self.workers[index]
        if worker.load.waiting_flops >= self.bounds.least_flops:
            return 0.0
        return worker.waiting.oldest().arrival_s + self.bounds.max_wait_s

    def promised(self, ticket: Ticket) -> Chain:
        """The blocks that a request given to a worker and not finished promises there."""
        return ticket.chain[: self._stored.get(ticket.id, len(ticket.chain))]

    def progress(self, number: int, done: int, of: int) -> None:
        """``done`` of the ``of`` layers of a sweep are computed."""
        self._worker_of_sweep[number].load.progress(number, done, of)

    def finished(self, number: int, events: BlockEvents | None = None) -> list[Ticket]:
        """A sweep is computed, or has failed: its requests, each of which is answered now or submitted again."""
        worker = self._worker_of_sweep.pop(number)
        if events is not None:
            worker.table.apply(events)
        tickets = [self._tickets.pop(id) for id in worker.load.finish(number)]
        for ticket in tickets:
            worker.table.forget(self.promised(ticket))
            del self._stored[ticket.id]
        return tickets

    def lost(self, index: int) -> int:
        """A worker is gone: what it had not finished is queued again, in front; returns how many requests."""
        worker = self.workers[index]
        for number in [n for n, w in self._worker_of_sweep.items() if w is worker]:
            del self._worker_of_sweep[number]
        unfinished = sorted((t for id, t in self._tickets.items() if worker.load.has(id)), key=lambda t: t.id)
        for ticket in unfinished:
            del self._tickets[ticket.id]
            worker.table.forget(self.promised(ticket))
            self._stored.pop(ticket.id, None)
        worker.load, worker.waiting = Load(), WaitingRoom()
        worker.table.restart(worker.table.generation)
        worker.alive = False
        self._alive = [w for w in self.workers if w.alive]
        self.policy.lost(worker)
        self.policy.queue.push_back(unfinished)
        _log.warning("worker %d is lost; %d requests are queued again", index, len(unfinished))
        return len(unfinished)

    def joined(self, index: int, generation: int) -> None:
        """A worker is (back) in service with an empty pool."""
        worker = self.workers[index]
        worker.alive = True
        worker.table.restart(generation)
        self._alive = [w for w in self.workers if w.alive]

    def _give(self, ticket: Ticket, worker: Worker) -> None:
        blocks = worker.table.match(ticket.chain, ticket.usable_blocks)
        blocks = worker.table.spared(ticket, blocks, self.costs.rule)
        worker.load.book(ticket, self.costs.of(ticket, BLOCK_TOKENS * blocks))
        worker.table.promise(ticket.chain)
        worker.waiting.add(ticket)
        self._tickets[ticket.id] = ticket

    def _promise_less(self, worker: Worker, tickets: Sequence[Ticket], shared: Sequence[int]) -> None:
        """What the pool will not take in of a sweep is of no use to those who come now."""
        kept = kept_blocks([ticket.chain for ticket in tickets], shared, self.bounds.kv_blocks)
        for ticket in tickets:
            stored = held_blocks(ticket.chain, len(ticket.chain), kept)
            worker.table.forget(ticket.chain[stored:])
            self._stored[ticket.id] = stored
