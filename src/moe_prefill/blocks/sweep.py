"""What a worker's pool is told of a sweep: its requests, the names of their blocks, and which will be asked again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from ..core import AtomicRequest
from .hashes import BLOCK_TOKENS, BlockHasher, Chain, common_blocks


@dataclass(frozen=True, eq=False)
class HashedSweep(Sequence[AtomicRequest]):
    """Requests that are computed together. ``chains``: of each, the digests of its whole blocks; empty where it shares
    with nobody. ``shared``: of each, how many leading blocks another request has promised or will ask for again.
    """

    requests: Sequence[AtomicRequest]
    chains: Sequence[Chain]
    shared: Sequence[int]

    @classmethod
    def of(cls, requests: Sequence[AtomicRequest], hasher: BlockHasher, private_beyond: int | None) -> HashedSweep:
        """A sweep of which nobody said more than its requests: shared is what two of them have in common. Requests of
        more than ``private_beyond`` tokens share with nobody.
        """
        longest = private_beyond if private_beyond is not None else 1 << 62
        chains = [
            hasher.chain(request.tokens, salt=request.salt) if len(request.tokens) <= longest else []
            for request in requests
        ]
        return cls(requests, chains, sibling_blocks(chains))

    def __len__(self) -> int:
        return len(self.requests)

    @overload
    def __getitem__(self, index: int) -> AtomicRequest: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[AtomicRequest]: ...

    def __getitem__(self, index: int | slice) -> AtomicRequest | Sequence[AtomicRequest]:
        return self.requests[index]


def usable_blocks(request: AtomicRequest) -> int:
    """How many leading blocks stored K and V may replace: a hit ends before the first asked position, whose hidden
    state is read, and so before the last token.
    """
    return int(request.positions[0]) // BLOCK_TOKENS


def sibling_blocks(chains: Sequence[Chain]) -> list[int]:
    """How many leading blocks each chain has in common with any other one of the list."""
    order = sorted(range(len(chains)), key=lambda index: tuple(chains[index]))
    found = [0] * len(chains)
    for left, right in itertools.pairwise(order):
        blocks = common_blocks(chains[left], chains[right])
        found[left], found[right] = max(found[left], blocks), max(found[right], blocks)
    return found
