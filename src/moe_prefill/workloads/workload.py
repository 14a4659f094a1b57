"""A list of requests with their arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..core import AtomicRequest

Rng = np.random.Generator


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """R requests in order of arrival. ``sources`` [R]: which data set each is like; ``arrival_s`` float64 [R]."""

    name: str
    requests: Sequence[AtomicRequest]
    sources: Sequence[str]
    arrival_s: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        assert len(self.requests) == len(self.sources) == len(self.arrival_s)
        assert (np.diff(self.arrival_s) >= 0).all(), "requests are in order of arrival"

    @property
    def num_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)

    def fitted(self, max_tokens: int, vocab_size: int) -> Workload:
        """The same workload for a smaller model. A source with requests of more than ``max_tokens`` keeps every k-th
        token, with the least k for which all fit, so what is shared stays shared; ids are wrapped into the vocabulary.
        The requests ask after their last token.
        """
        longest: dict[str, int] = {}
        for source, request in zip(self.sources, self.requests, strict=True):
            longest[source] = max(longest.get(source, 0), len(request.tokens))
        thinned = [
            AtomicRequest.candidates(request.tokens[:: -(-longest[source] // max_tokens)] % vocab_size, request.ids)
            for source, request in zip(self.sources, self.requests, strict=True)
        ]
        return replace(self, requests=thinned)
