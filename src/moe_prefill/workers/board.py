"""Who computes which sweep: the one place that decides. No clock, no process, no socket."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue

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
    """Sweeps that wait, in order, and those that each rank was given.

    Without rounds a sweep goes to the rank with the fewest. With ``rounds`` every rank gets exactly one entry of each
    numbered round, empty where sweeps are short. Which rank computes a sweep never changes its results.
    """

    def __init__(self, num_ranks: int, *, rounds: bool) -> None:
        self._rounds = rounds
        self._waiting: deque[Sweep] = deque()
        self._given: list[deque[Given]] = [deque() for _ in range(num_ranks)]
        self._next_number = 0

    @property
    def idle(self) -> bool:
        return not self._waiting and not any(self._given)

    def busy(self) -> list[bool]:
        """Which ranks have something to do."""
        return [bool(given) for given in self._given]

    def add(self, sweep: Sweep) -> None:
        self._waiting.append(sweep)

    def give(self) -> Iterator[Given]:
        """Hand out what the ranks have room for."""
        while self._waiting:
            ranks = self._ranks_with_room()
            if not ranks:
                return
            for rank in ranks:
                given = Given(rank, self._next_number, self._waiting.popleft() if self._waiting else None)
                self._given[rank].append(given)
                self._next_number += not self._rounds
                yield given
            self._next_number += self._rounds

    def done(self, rank: int, number: int) -> Sweep | None:
        """The sweep that a rank has finished; ranks work in the order in which they were given."""
        given = self._given[rank].popleft()
        assert given.number == number, (rank, given.number, number)
        return given.sweep

    def take_back(self) -> int:
        """Let everything unfinished wait again, ahead of the rest and in the old order; returns how many sweeps."""
        unfinished = sorted((given for queue in self._given for given in queue), key=lambda g: (g.number, g.rank))
        sweeps = [given.sweep for given in unfinished if given.sweep is not None]
        self._waiting.extendleft(reversed(sweeps))
        for queue in self._given:
            queue.clear()
        return len(sweeps)

    def drain(self) -> list[Sweep]:
        """Take everything off the board."""
        self.take_back()
        sweeps = list(self._waiting)
        self._waiting.clear()
        return sweeps

    def _ranks_with_room(self) -> list[int]:
        if self._rounds:
            full = any(len(queue) >= DEPTH for queue in self._given)
            return [] if full else list(range(len(self._given)))
        least = min(range(len(self._given)), key=lambda rank: len(self._given[rank]))
        return [least] if len(self._given[least]) < DEPTH else []
