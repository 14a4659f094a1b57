"""Requests in order of their prefixes, so that those that share one are neighbours."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from ..blocks import common_blocks
from .ticket import Ticket

SIBLING_BLOCKS = 4  # 64 tokens: what a shared run has to save at the least to be computed apart (forming.sharing_rule)

_Key = tuple[Sequence[bytes], int, Ticket]


class Siblings:
    """A changing set of requests, by prefix."""

    def __init__(self) -> None:
        self._keys: list[_Key] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add_all(self, tickets: Sequence[Ticket]) -> None:
        if tickets:
            self._keys += map(_key, tickets)
            self._keys.sort()

    def remove(self, tickets: Sequence[Ticket]) -> None:
        """Take out these, all of which are here."""
        if len(tickets) <= 4:
            for ticket in tickets:
                del self._keys[bisect_left(self._keys, _key(ticket))]
        else:
            gone = {ticket.id for ticket in tickets}
            self._keys = [key for key in self._keys if key[1] not in gone]

    def of(self, ticket: Ticket) -> Iterator[tuple[Ticket, int]]:
        """Those that share at least ``SIBLING_BLOCKS`` blocks with ``ticket``, which is one of them, and how many; the
        closest first. Nothing may be added or removed meanwhile.
        """
        keys = self._keys
        here = bisect_left(keys, _key(ticket))
        assert keys[here][2] is ticket, ticket.id
        yield ticket, len(ticket.chain)
        left, right = here - 1, here + 1
        left_blocks = self._shared(ticket, left)
        right_blocks = self._shared(ticket, right)
        while max(left_blocks, right_blocks) >= SIBLING_BLOCKS:
            if right_blocks >= left_blocks:
                yield keys[right][2], right_blocks
                right += 1
                right_blocks = self._shared(ticket, right)
            else:
                yield keys[left][2], left_blocks
                left -= 1
                left_blocks = self._shared(ticket, left)

    def in_order(self) -> Iterator[tuple[Ticket, int]]:
        """All requests in order; with each, how many blocks it shares with the one before it."""
        before: Sequence[bytes] = ()
        for chain, _, ticket in self._keys:
            yield ticket, common_blocks(before, chain)
            before = chain

    def _shared(self, ticket: Ticket, index: int) -> int:
        return common_blocks(ticket.chain, self._keys[index][2].chain) if 0 <= index < len(self._keys) else 0


def _key(ticket: Ticket) -> _Key:
    return ticket.chain, ticket.id, ticket
