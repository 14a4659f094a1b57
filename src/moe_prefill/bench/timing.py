"""The protocol of every timing: warm up until two runs agree, then the median of several."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

AGREE = 0.02  # two runs that differ by less end the warm-up
_MOST_WARM_UPS = 7
_RUNS, _ENOUGH_S = 5, 15.0


@dataclass(slots=True)
class Timing:
    """Seconds of runs as they come in. ``seconds`` is the least time that the timed runs should take together.

    ``goal`` is how many runs there will be in all, None while it is not known. It is known one run ahead, so that a
    caller that starts a run before the one before it has ended starts none too many.
    """

    seconds: float = 3.0
    runs: list[float] = field(default_factory=list)
    warm_ups: int | None = None

    def add(self, seconds: float) -> None:
        self.runs.append(seconds)
        if self.warm_ups is None and self._is_warm():
            self.warm_ups = len(self.runs)

    @property
    def goal(self) -> int | None:
        """At least five timed runs, or 15 s of them, but two in any case."""
        if self.warm_ups is None:
            return None
        one = max(self.runs[self.warm_ups - 1], 1e-4)
        few = max(2, min(_RUNS, math.ceil(_ENOUGH_S / one)))
        return self.warm_ups + max(few, math.ceil(self.seconds / one))

    @property
    def is_done(self) -> bool:
        return self.goal is not None and len(self.runs) >= self.goal

    @property
    def first(self) -> float:
        return self.runs[0]

    @property
    def timed(self) -> list[float]:
        return self.runs[self.warm_ups :]

    @property
    def median(self) -> float:
        return statistics.median(self.timed)

    def _is_warm(self) -> bool:
        if len(self.runs) < 2:
            return False
        before, now = self.runs[-2:]
        return abs(now - before) <= AGREE * before or len(self.runs) >= _MOST_WARM_UPS
