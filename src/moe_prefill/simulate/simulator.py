"""Virtual time: the frontend decides, simulated workers take their time, events are played in order."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import Overloaded
from ..frontend import Frontend, Machine, Policy, Ticket
from .timing import SweepTimer
from .worker import SimulatedWorker

_LOOKS = 8  # at all workers' progress, during every sweep of each


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One simulated run. ``busy_s``, one a worker; ``latency_s`` and ``worker_of``, one a request by its place in the
    list, NaN and -1 where it was refused. ``order``: places in the order in which requests were given out.
    """

    makespan_s: float = 0.0
    busy_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    computed_tokens: int = 0
    flops: int = 0
    sweeps: int = 0
    refused: int = 0
    latency_s: list[float] = field(default_factory=list)
    worker_of: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.prompt_tokens / self.makespan_s

    @property
    def saved_fraction(self) -> float:
        return (self.prompt_tokens - self.computed_tokens) / self.prompt_tokens

    @property
    def imbalance(self) -> float:
        """Busy seconds of the busiest worker over those of the least busy one; infinite where that had nothing."""
        return max(self.busy_s) / min(self.busy_s) if min(self.busy_s) else math.inf

    def latency_quantile_s(self, quantile: float) -> float:
        return float(np.nanquantile(self.latency_s, quantile))


def simulate(
    tickets: Sequence[Ticket],
    machine: Machine,
    num_workers: int,
    policy: Policy,
    *,
    watch: Callable[[Simulation], None] | None = None,
) -> Outcome:
    """Serve these requests, whose ids are their places in the list, until all are answered. ``watch`` is called
    whenever the frontend has decided.
    """
    assert all(ticket.id == place for place, ticket in enumerate(tickets)), "ids are places in the list"
    return Simulation(tickets, machine, num_workers, policy, watch or (lambda simulation: None)).run()


class Simulation:
    """The clock and the events of one run."""

    def __init__(
        self,
        tickets: Sequence[Ticket],
        machine: Machine,
        num_workers: int,
        policy: Policy,
        watch: Callable[[Simulation], None],
    ) -> None:
        timer = SweepTimer(machine)
        self.now_s = 0.0
        self.frontend = Frontend(num_workers, policy, machine.costs, machine.bounds, machine.admission)
        self.workers = [SimulatedWorker(index, timer) for index in range(num_workers)]
        self.outcome = Outcome(latency_s=[float("nan")] * len(tickets), worker_of=[-1] * len(tickets))
        self._num_layers = machine.spec.num_layers
        self._watch = watch
        self._serial = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        for ticket in tickets:
            self._at(ticket.arrival_s, lambda ticket=ticket: self._arrive(ticket))  # type: ignore[misc]

    def run(self) -> Outcome:
        while self._events:
            self.now_s = self._events[0][0]
            while self._events and self._events[0][0] == self.now_s:
                heapq.heappop(self._events)[2]()
            for worker in self.workers:
                self._report(worker)
            self.frontend.route()
            for worker in self.workers:
                self._start(worker)
            self._watch(self)
        assert self.frontend.idle, "everything taken in is answered"
        self.outcome.busy_s = [worker.busy_s for worker in self.workers]
        return self.outcome

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._serial), event))

    def _arrive(self, ticket: Ticket) -> None:
        try:
            self.frontend.submit(ticket)
        except Overloaded:
            self.outcome.refused += 1

    def _report(self, worker: SimulatedWorker) -> None:
        """What the worker's page says: finished layers, all of them taking equally long."""
        run = worker.running
        if run is not None:
            layers = self._num_layers
            done = int(layers * min(1.0, (self.now_s - run.start_s) / run.seconds))
            self.frontend.progress(run.sweep.number, done, layers)

    def _start(self, worker: SimulatedWorker) -> None:
        """Begin a worker's next sweep if it has none."""
        if worker.running is not None or not len(self.frontend.workers[worker.index].waiting):
            return
        wakes_s = self.frontend.wakes_at(worker.index)
        if wakes_s > self.now_s:
            self._at(wakes_s, lambda: None)
            return
        sweep = self.frontend.next_sweep(worker.index, self.now_s)
        assert sweep is not None
        run = worker.start(sweep, self.now_s)
        for part in range(1, _LOOKS):
            self._at(self.now_s + run.seconds * part / _LOOKS, lambda: None)
        self._at(self.now_s + run.seconds, lambda: self._finish(worker))

    def _finish(self, worker: SimulatedWorker) -> None:
        run, outcome = worker.running, self.outcome
        assert run is not None
        for ticket in self.frontend.finished(run.sweep.number, worker.finish()):
            outcome.latency_s[ticket.id] = self.now_s - ticket.arrival_s
            outcome.worker_of[ticket.id] = worker.index
            outcome.order.append(ticket.id)
            outcome.prompt_tokens += ticket.num_tokens
        outcome.computed_tokens += run.tokens
        outcome.flops += run.flops
        outcome.sweeps += 1
        outcome.makespan_s = self.now_s
