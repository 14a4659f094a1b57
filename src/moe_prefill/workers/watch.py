"""When a worker that is alive has to be given up. Pure but for the clock that it is handed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the controller waits, in seconds, and how often it tries again.

    A worker hangs when it has work and finishes no layer for ``layer_s`` or ``layer_factor`` times the longest layer
    seen or predicted so far, whichever is more. ``restarts`` are in a row: finished work starts the count again.
    """

    start_s: float = 3600.0  # until the engines are built: weights may come over a network
    layer_s: float = 30.0
    layer_factor: float = 10.0
    stop_s: float = 10.0  # for an orderly end, then the processes are killed
    restarts: int = 3


class Watch:
    """Follows the layers that each rank has finished, which ``counts`` reads, through one life of the group."""

    def __init__(
        self,
        counts: Callable[[], list[int]],
        patience: Patience,
        predicted_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counts, self._patience, self._clock = counts, patience, clock
        self._last = counts()
        self._since = [clock()] * len(self._last)
        self.longest_s = predicted_s

    @property
    def limit_s(self) -> float:
        return max(self._patience.layer_s, self._patience.layer_factor * self.longest_s)

    def hanging(self, busy: Sequence[bool]) -> list[int]:
        """The ranks that have work (``busy``) and have not moved for too long."""
        now = self._clock()
        for rank, count in enumerate(self._counts()):
            moved = count - self._last[rank]
            if moved and busy[rank]:
                self.longest_s = max(self.longest_s, (now - self._since[rank]) / moved)
            if moved or not busy[rank]:
                self._last[rank], self._since[rank] = count, now
        return [rank for rank, since in enumerate(self._since) if now - since > self.limit_s]
