"""T kept honest: it follows what the workers say of their waiting for expert banks."""

from __future__ import annotations

import logging
from collections import deque

_log = logging.getLogger(__name__)

_EXPOSED = 0.01  # of a sweep's time: more than that, at T, and T is too low
_LOOK_BACK = 8  # sweeps at T or above that are judged together
_LEAST = 3  # of them, before anything is concluded
_HEADROOM = 1.1  # beyond the work that would just have hidden the copies
_FALL = 0.99  # for every quiet sweep
_WORTH_SAYING = 1.1  # how far T has fallen between two lines of the log


class Threshold:
    """T in FLOPs of one sweep. ``planned`` comes from the cost model and is the least; ``most`` is a sweep that fills
    the memory plan.

    Sweeps below T may wait for their banks. When those at T or above waited for more than 1% of their time, T rises to
    the work that would have hidden what was exposed (waiting is copy time less compute time, so work grows by the ratio
    of whole to computing time). While they wait for less, T falls back towards the plan, 1% a sweep.
    """

    def __init__(self, planned: int, most: int) -> None:
        self.planned, self.most = min(planned, most), most
        self.flops = self._said = self.planned
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=_LOOK_BACK)  # FLOPs, seconds, exposed seconds

    def observe(self, flops: int, seconds: float, exposed_s: float) -> bool:
        """A worker computed a sweep of ``flops`` in ``seconds``, of which it waited ``exposed_s`` for banks. Returns
        whether T has changed.
        """
        if flops < self.flops or seconds <= 0:
            return False
        self._seen.append((flops, seconds, min(exposed_s, seconds)))
        if len(self._seen) < _LEAST:
            return False
        before = self.flops
        if self._exposed > _EXPOSED:
            self._rise()
        elif exposed_s <= _EXPOSED * seconds:
            self.flops = max(self.planned, int(_FALL * self.flops))
            self._say_fall()
        return self.flops != before

    @property
    def _exposed(self) -> float:
        """The part of their time that the last sweeps waited."""
        return sum(exposed for _, _, exposed in self._seen) / sum(seconds for _, seconds, _ in self._seen)

    def _rise(self) -> None:
        exposed, count = self._exposed, len(self._seen)
        needed = sum(f for f, _, _ in self._seen) / count / max(1.0 - exposed, 0.1)
        before, self.flops = self.flops, min(self.most, max(self.flops, int(_HEADROOM * needed)))
        self._seen.clear()  # they were judged by the old T
        if self.flops == before:
            return
        self._said = self.flops
        bound = ", the largest sweep that memory allows" if self.flops == self.most else ""
        _log.warning(
            "T rises from %.4g to %.4g FLOPs a sweep%s: the last %d sweeps at T waited %.1f%% of their time for banks",
            before,
            self.flops,
            bound,
            count,
            100 * exposed,
        )

    def _say_fall(self) -> None:
        if self.flops != self._said and (self.flops == self.planned or self._said > _WORTH_SAYING * self.flops):
            _log.info("T is back at %.4g FLOPs a sweep (planned %.4g)", self.flops, self.planned)
            self._said = self.flops
