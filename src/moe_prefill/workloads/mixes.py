"""Named workloads."""

from __future__ import annotations

from functools import partial

import numpy as np

from ..errors import UsageError
from . import sources
from .sources import Source
from .workload import Workload

_SHORT: dict[str, Source] = {"mmlu": sources.mmlu, "boolq": sources.boolq, "imdb": sources.imdb}
_SHARED: dict[str, Source] = {"quality": sources.quality, "moral-stories": sources.moral_stories}
_AGGREGATED: dict[str, Source] = {**_SHARED, **_SHORT, "arxiv": sources.arxiv}

_MIXES: dict[str, dict[str, Source]] = {
    "aggregated": _AGGREGATED,
    "no-pairs": {**_AGGREGATED, "arxiv": partial(sources.arxiv, pairs=False)},
    "high": _SHARED,
    "low": _SHORT,
    "none": {"unshared": sources.unshared},
    "hot-prefix": {"hot-prefix": sources.hot_prefix},
    "hot-few": {"hot-few": sources.hot_few},
    "bursts": _AGGREGATED,
}
MIXES = tuple(_MIXES)


def make_workload(
    name: str, *, seed: int = 0, scale: float = 1.0, bursts: int = 8, interval_s: float = 10.0
) -> Workload:
    """A mix of ``MIXES``, shuffled, all at time 0; ``bursts`` arrives in that many bursts, ``interval_s`` apart.

    ``aggregated`` is the paper's (73.8K requests, 37.9M tokens at scale 1). UsageError: there is no such mix.
    """
    if name not in _MIXES:
        raise UsageError(f"there is no workload {name!r}; there are {', '.join(MIXES)}")
    rng = np.random.default_rng(seed)
    parts = [(source, make(rng, scale)) for source, make in _MIXES[name].items()]
    requests, names = sources.shuffled(rng, parts)
    arrival_s = np.zeros(len(requests))
    if name == "bursts":
        arrival_s = interval_s * (np.arange(len(requests)) * bursts // len(requests)).astype(np.float64)
    return Workload(name, requests, names, arrival_s)
