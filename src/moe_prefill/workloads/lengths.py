"""Lengths with a given range and an exact total."""

from __future__ import annotations

import numpy as np

from ..core import Int64Array
from .workload import Rng


def spread_lengths(rng: Rng, count: int, low: int, high: int, total: int) -> Int64Array:
    """``count`` lengths in [low, high] that add up to ``total``: low + (high - low) u^p for uniform u, with the p that
    gives the mean.
    """
    mean = total / count
    assert low < mean < high, (low, mean, high)
    power = (high - low) / (mean - low) - 1
    return _exact(low + (high - low) * rng.random(count) ** power, low, high, total)


def skewed_lengths(rng: Rng, count: int, low: int, high: int, total: int, sigma: float = 0.6) -> Int64Array:
    """The same with a lognormal of that sigma, cut at both ends: most are short and a few very long."""
    normal = rng.standard_normal(count)

    def lengths(log_scale: float) -> np.ndarray:
        return np.clip(np.exp(log_scale + sigma * normal), low, high)

    lowest, highest = np.log(low) - 5.0, np.log(high) + 5.0
    for _ in range(60):
        middle = (lowest + highest) / 2
        lowest, highest = (middle, highest) if lengths(middle).sum() < total else (lowest, middle)
    return _exact(lengths(highest), low, high, total)


def _exact(lengths: np.ndarray, low: int, high: int, total: int) -> Int64Array:
    """Scale the distance from ``low``, round, and correct one token at a time until the sum is exact."""
    assert low * len(lengths) <= total <= high * len(lengths), (low, high, len(lengths), total)
    above = (lengths - low) * ((total - low * len(lengths)) / max((lengths - low).sum(), 1e-9))
    whole: Int64Array = np.clip(np.round(low + above), low, high).astype(np.int64)
    while (missing := total - int(whole.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = np.flatnonzero(whole < high if step > 0 else whole > low)
        whole[movable[: abs(missing)]] += step
    return whole
