"""Who computes which sweep: the one place that decides. No clock, no process, no socket."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue

from ..core import Schedule
from ..messages import PackedRequests, PackedResults

DEPTH = 2  # sweeps given to a rank at a time: one is computed, the next one planned and enqueued behind it


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """Requests that are computed together. ``members`` are their places in the caller's list, and ``inbox`` is where
    the caller waits: for (members, results), or for an error.
    """

    members: list[int]
    requests: PackedRequests
    inbox: SimpleQueue[tuple[list[int], PackedResults] | Exception]


@dataclass(frozen=True, slots=True)
class Given:
    """A rank's next sweep; None: its part of a round in which it has nothing to compute."""

    rank: int
    number: int
    sweep: Sweep | None


class Board:
    """Sweeps that wait, in order, and those that each rank was given. Which rank computes a sweep never changes its
    results.

    The schedule ``free`` gives a sweep to the rank with the fewest. With ``rounds`` every rank gets exactly one entry
    of each numbered round. With ``together`` every rank gets every sweep, in the same order; what the last rank answers
    counts (it is the last stage of a pipeline; under other strategies all answer alike).
    """

    def __init__(self, num_ranks: int, schedule: Schedule) -> None:
        self._schedule: Schedule = schedule
        self._waiting: deque[Sweep] = deque()
        self._ahead: list[deque[Given]] = [deque() for _ in range(num_ranks)]  # decided, and not yet given
        self._given: list[deque[Given]] = [deque() for _ in range(num_ranks)]
        self._next_number = 0

    @property
    def idle(self) -> bool:
        return not self._waiting and not any(self._given) and not any(self._ahead)

    def busy(self) -> list[bool]:
        """Which ranks have something to do."""
        return [bool(given) for given in self._given]

    def add(self, sweep: Sweep) -> None:
        self._waiting.append(sweep)

    def give(self) -> Iterator[Given]:
        """Hand out what the ranks have room for."""
        while (rank := self._rank_with_room()) is not None:
            if not self._ahead[rank]:
                if not self._waiting:
                    return
                self._decide(rank)
            given = self._ahead[rank].popleft()
            self._given[rank].append(given)
            yield given

    def done(self, rank: int, number: int) -> Sweep | None:
        """The sweep that a rank has answered; ranks work in the order in which they were given."""
        given = self._given[rank].popleft()
        assert given.number == number, (rank, given.number, number)
        return given.sweep if self._counts(rank) else None

    def take_back(self) -> int:
        """Let everything unfinished wait again, ahead of the rest and in the old order; returns how many sweeps."""
        ranks = filter(self._counts, range(len(self._given)))
        unfinished = [given for rank in ranks for given in (*self._given[rank], *self._ahead[rank])]
        unfinished.sort(key=lambda given: (given.number, given.rank))
        sweeps = [given.sweep for given in unfinished if given.sweep is not None]
        self._waiting.extendleft(reversed(sweeps))
        for queue in (*self._given, *self._ahead):
            queue.clear()
        return len(sweeps)

    def drain(self) -> list[Sweep]:
        """Take everything off the board."""
        self.take_back()
        sweeps = list(self._waiting)
        self._waiting.clear()
        return sweeps

    def _decide(self, rank: int) -> None:
        """Who computes the sweeps that have waited longest; ``rank`` is one of them."""
        entries: dict[int, Sweep | None]
        if self._schedule == "free":
            entries = {rank: self._waiting.popleft()}
        elif self._schedule == "together":
            entries = dict.fromkeys(range(len(self._given)), self._waiting.popleft())
        else:
            entries = {each: self._waiting.popleft() if self._waiting else None for each in range(len(self._given))}
        for each, sweep in entries.items():
            self._ahead[each].append(Given(each, self._next_number, sweep))
        self._next_number += 1

    def _rank_with_room(self) -> int | None:
        """The rank that has been given the fewest; first those for which something is decided."""
        ranks = [rank for rank, given in enumerate(self._given) if len(given) < DEPTH]
        return min(ranks, key=lambda rank: (not self._ahead[rank], len(self._given[rank])), default=None)

    def _counts(self, rank: int) -> bool:
        return self._schedule != "together" or rank == len(self._given) - 1
