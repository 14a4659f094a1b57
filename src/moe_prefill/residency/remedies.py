"""What a plan can do about banks that are waited for although their link keeps up.

With two buffers and a streamed bank in every layer, the first bank of the next sweep comes while the last layer
computes. Where that one is pruned to the asked rows it is too short, whatever the sweep's size. One more buffer lets
this bank come a layer earlier; one more resident bank gives it the time of a whole layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..core import Level, ModelSpec
from ..costmodel import SweepPrediction
from .levels import Levels, levels_of, num_streamed, prefetch_depth

# A predicted sweep at these levels: tokens, rows of a chunk, bank buffers.
Predict = Callable[[Levels, int, int, int], SweepPrediction]

MOST_EXPOSED = 0.005  # of a sweep's time; what is predicted to wait longer is worth a bank's memory
_WORST_FIRST: tuple[Level, ...] = ("offloaded", "hybrid", "sharded")


@dataclass(frozen=True, slots=True)
class Remedy:
    """Other levels or a deeper prefetch; ``name`` as it is explained."""

    name: str
    levels: Levels
    depth: int | None


def remedies(spec: ModelSpec, levels: Levels, depth: int | None, *, pinned: bool) -> Iterator[Remedy]:
    """What may be tried for a plan with these levels: a bank of the worst level becomes resident, unless the user
    pinned the levels; one more buffer fills ahead, unless he pinned the ``depth`` or shards are staged first.
    """
    counts: Counter[Level] = Counter(level for level in levels if level is not None)
    worst = next((level for level in _WORST_FIRST if counts[level]), None)
    if worst is None:
        return
    if not pinned:
        changed = {**counts, "resident": counts["resident"] + 1, worst: counts[worst] - 1}
        yield Remedy("one more resident bank", levels_of(spec, changed), depth)
    if depth is None and "hybrid" not in levels and num_streamed(levels) > 1:
        yield Remedy("one more bank buffer", levels, prefetch_depth(levels) + 1)


def exposed_share(sweep: SweepPrediction) -> float:
    """The part of a sweep's time, in the steady state, in which it waits for banks."""
    return sweep.exposed_s / sweep.sweep_s
