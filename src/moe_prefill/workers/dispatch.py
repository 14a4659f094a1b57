"""Between the frontend and the ranks: who is given which sweep, and when. No clock, no process, no socket."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..blocks import BlockEvents
from ..core import RunStats, Schedule, WorkerState
from ..frontend import FormedSweep, Frontend, Limits, Machine, Policy, Threshold, Ticket, full_sweep_flops
from ..messages import PackedChains, PackedRequests, Score

_log = logging.getLogger(__name__)

_LEAD_SHARE, _LEAST_LEAD_S = 0.25, 0.005
_LOOK_S = 0.05  # how often progress is looked at while requests are held back
_MEMORY = 0.9  # of the pace, from sweep to sweep
_NOTHING = PackedRequests.pack([])


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """How far ahead a rank is given its next sweep: ``depth`` sweeps at most, the next one when the one that runs is
    predicted to take a quarter of its time more, and no more than ``seconds``. What is formed cannot change any more,
    so no earlier than planning it takes.
    """

    depth: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Given:
    """``sweep`` None: a rank's part of a round in which it has nothing to compute."""

    number: int
    sweep: FormedSweep | None


class Dispatch:
    """The frontend of some ranks, told what the ranks report; one thread owns it.

    ``counts`` [ranks] are the layers that each has finished since it started. Under the schedule ``rounds`` every rank
    gets one entry of each round, an empty one if it has no requests.
    """

    def __init__(self, machine: Machine, policy: Policy, num_ranks: int, schedule: Schedule, lead: Lead) -> None:
        assert schedule != "together", "every rank computes every sweep: nothing is to be routed"
        self.machine = machine
        self.frontend = Frontend(num_ranks, policy, machine.costs, machine.bounds, machine.admission)
        full = full_sweep_flops(machine.spec, machine.sweep_tokens)
        self.threshold = Threshold(machine.limits.saturated, full)
        self._took_s = self._predicted_s = 0.0  # of sweeps, older ones counting less
        self._schedule, self._lead = schedule, lead
        self._given: list[deque[_Given]] = [deque() for _ in range(num_ranks)]
        self._work = [RunStats() for _ in range(num_ranks)]
        self._begun = [0] * num_ranks  # layers that a rank had finished before the sweep that it computes
        self._next_round = 0
        self._to_audit = set[int]()

    @property
    def idle(self) -> bool:
        return self.frontend.idle and not any(self._given)

    @property
    def pace(self) -> float:
        """Seconds that sweeps take, over what is predicted."""
        return self._took_s / self._predicted_s if self._took_s and self._predicted_s else 1.0

    def busy(self) -> list[bool]:
        return [bool(given) for given in self._given]

    def joined(self, generation: int, counts: Sequence[int]) -> None:
        """All ranks are ready, with empty pools."""
        for rank, count in enumerate(counts):
            self.frontend.joined(rank, generation)
            self._begun[rank] = count

    def lost(self) -> int:
        """All ranks are gone; returns how many sweeps have to be computed again."""
        unfinished = sum(entry.sweep is not None for given in self._given for entry in given)
        for rank, given in enumerate(self._given):
            given.clear()
            self.frontend.lost(rank)
        self._to_audit.clear()
        return unfinished

    def give(self, now_s: float, counts: Sequence[int]) -> list[tuple[int, Score, Sequence[Ticket]]]:
        """Route what waits, and form the sweeps that ranks are to be sent now; with each, its requests."""
        self._look(counts)
        self.frontend.route()
        given = self._next_of_free(now_s) if self._schedule == "free" else self._next_of_rounds(now_s)
        for rank, entry in given:
            self._given[rank].append(entry)
            self._to_audit.discard(rank)
        return [(rank, self._score(entry), entry.sweep.tickets if entry.sweep else ()) for rank, entry in given]

    def done(self, rank: int, number: int, stats: RunStats, events: BlockEvents | None) -> list[Ticket] | None:
        """A rank has computed its oldest sweep: the requests, which are answered now; None: there was none."""
        entry = self._given[rank].popleft()
        assert entry.number == number, (rank, entry.number, number)
        self._begun[rank] += self.machine.spec.num_layers
        self._work[rank] += stats
        if events is not None:
            self.frontend.workers[rank].table.apply(events)
            self._to_audit.add(rank)
        if entry.sweep is None:
            return None
        self._learn(rank, entry.sweep, stats)
        return self.frontend.finished(entry.sweep.number)

    def states(self) -> list[WorkerState]:
        """Every rank, for reports; any thread may ask."""
        residency = dict(Counter[str](level or "dense" for level in self.machine.streaming.levels))
        return [
            WorkerState(
                rank=rank,
                alive=worker.alive,
                load_flops=worker.load.flops,
                saturation_flops=self.threshold.flops,
                residency=residency,
                stats=self._work[rank],
            )
            for rank, worker in enumerate(self.frontend.workers)
        ]

    def wait_s(self, now_s: float) -> float | None:
        """Until when there is nothing to decide, if nothing comes; None: for ever."""
        moments = []
        for rank, worker in enumerate(self.frontend.workers):
            if len(worker.waiting):
                moments.append(max(self.frontend.wakes_at(rank) - now_s, self._room_in_s(rank)))
        if self.frontend.queued and any(self._given):
            moments.append(_LOOK_S)
        return max(0.001, min(moments)) if moments and min(moments) < math.inf else None

    def to_audit(self) -> list[int]:
        """Ranks whose pool is to be compared with what is believed of it: everything is idle, or events were lost."""
        workers = self.frontend.workers
        ranks = [rank for rank in self._to_audit if self.idle or not workers[rank].table.trusted]
        self._to_audit.difference_update(ranks)
        return ranks

    def audited(self, rank: int, state: BlockEvents) -> list[str]:
        """What a rank's pool holds; returns how its table differed."""
        table = self.frontend.workers[rank].table
        pool = [digest for change in state.changes for digest in change.digests]
        found = table.audit(pool) if self.idle and table.trusted else []
        if found:
            _log.warning("the table of worker %d differs from its pool: %s", rank, "; ".join(found))
        table.apply(state)
        return found

    def _next_of_free(self, now_s: float) -> list[tuple[int, _Given]]:
        ranks = [rank for rank in range(len(self._given)) if self._room_in_s(rank) <= 0]
        sweeps = [(rank, self.frontend.next_sweep(rank, now_s)) for rank in ranks]
        return [(rank, _Given(sweep.number, sweep)) for rank, sweep in sweeps if sweep is not None]

    def _next_of_rounds(self, now_s: float) -> list[tuple[int, _Given]]:
        """One sweep of each rank, once any of them is due: a round takes its time also where less than T waits."""
        frontend, ranks = self.frontend, range(len(self._given))
        due = any(len(frontend.workers[rank].waiting) and frontend.wakes_at(rank) <= now_s for rank in ranks)
        if not due or self._room_in_s(0) > 0:
            return []
        number = self._next_round
        self._next_round += 1
        return [(rank, _Given(number, frontend.next_sweep(rank, float("inf")))) for rank in ranks]

    def _room_in_s(self, rank: int) -> float:
        """Predicted seconds until a rank is to be given more; infinite: not before it has answered. In rounds all ranks
        are given together.
        """
        if self._schedule == "rounds":
            return max(map(self._own_room_in_s, range(len(self._given))))
        return self._own_room_in_s(rank)

    def _own_room_in_s(self, rank: int) -> float:
        given, load = self._given[rank], self.frontend.workers[rank].load
        if not given:
            return 0.0
        if len(given) >= self._lead.depth:
            return math.inf
        numbers = [entry.sweep.number for entry in given if entry.sweep is not None]
        left_s = self.pace * sum(map(load.left_ns, numbers)) / 1e9
        whole_s = self.pace * sum(map(load.predicted_ns, numbers)) / 1e9
        return left_s - max(_LEAST_LEAD_S, min(self._lead.seconds, _LEAD_SHARE * whole_s))

    def _look(self, counts: Sequence[int]) -> None:
        layers = self.machine.spec.num_layers
        for rank, given in enumerate(self._given):
            if given and given[0].sweep is not None:
                done = min(max(counts[rank] - self._begun[rank], 0), layers)
                self.frontend.progress(given[0].sweep.number, done, layers)

    def _learn(self, rank: int, sweep: FormedSweep, stats: RunStats) -> None:
        """The pace, and T."""
        frontend = self.frontend
        predicted_s = frontend.workers[rank].load.predicted_ns(sweep.number) / 1e9
        self._took_s = _MEMORY * self._took_s + stats.busy_s
        self._predicted_s = _MEMORY * self._predicted_s + predicted_s
        if self.machine.max_sweep_s is not None:
            frontend.bounds = replace(frontend.bounds, max_s=self.machine.max_sweep_s / self.pace)
        if self.threshold.observe(stats.flops, stats.busy_s, stats.exposed_s):
            frontend.saturate(Limits(saturated=self.threshold.flops, full=self.machine.limits.full))

    def _score(self, entry: _Given) -> Score:
        if entry.sweep is None:
            return Score(number=entry.number, requests=_NOTHING)
        tickets, chains = entry.sweep.tickets, None
        if self.machine.kv_blocks:
            chains = PackedChains.pack([ticket.chain for ticket in tickets], entry.sweep.shared_blocks)
        return Score(number=entry.number, requests=PackedRequests.pack([t.request for t in tickets]), chains=chains)
