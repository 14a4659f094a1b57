"""A measured rate as a function of size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """Rates at ascending sizes, at least one; everything positive (else ValueError).

    Between two sizes the rate is a power of the size (a straight line in the logarithms); above the largest it stays.
    Below the smallest it falls in proportion, since work that small takes no less time: a curve of 100/s at 10 gives
    100/s at 20, 100/s at 10 and 50/s at 5.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.sizes) == len(self.rates) > 0:
            raise ValueError(f"a curve has {len(self.sizes)} sizes and {len(self.rates)} rates")
        if not all(math.isfinite(value) and value > 0 for value in (*self.sizes, *self.rates)):
            raise ValueError(f"sizes {self.sizes} or rates {self.rates} of a curve are not positive")
        if not all(a < b for a, b in itertools.pairwise(self.sizes)):
            raise ValueError(f"sizes {self.sizes} of a curve do not ascend")

    @classmethod
    def constant(cls, rate: float) -> Curve:
        """The same rate at every size from 1 on."""
        return cls((1.0,), (rate,))

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """From (size, rate) pairs in any order."""
        ordered = sorted(points)
        return cls(tuple(float(size) for size, _ in ordered), tuple(float(rate) for _, rate in ordered))

    @property
    def best(self) -> float:
        """The highest rate that was measured."""
        return max(self.rates)

    @overload
    def at(self, size: float) -> float: ...
    @overload
    def at(self, size: FloatArray) -> FloatArray: ...
    def at(self, size: float | FloatArray) -> float | FloatArray:
        """The rate at a positive size, or at each of an array of sizes."""
        logs = np.log(np.asarray(size, np.float64))
        first = np.log(self.sizes[0])
        rates = np.exp(np.interp(logs, np.log(self.sizes), np.log(self.rates)) + np.minimum(logs - first, 0.0))
        return rates if isinstance(size, np.ndarray) else float(rates)

    def scaled(self, factor: float) -> Curve:
        """The same sizes with all rates times ``factor``."""
        return Curve(self.sizes, tuple(rate * factor for rate in self.rates))
