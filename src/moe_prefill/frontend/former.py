"""Which of a worker's requests make its next sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..blocks import BLOCK_TOKENS, Digest, held_blocks
from ..forest import Forest, SharingRule, build_forest
from .costs import RequestCosts
from .siblings import Siblings
from .ticket import Ticket

_MAX_PASSED_OVER = 16  # groups that do not fit any more, before a sweep counts as full


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepBounds:
    """``max_tokens``: of a sweep's forest, from the memory plan. ``max_s``: predicted seconds, or None. A sweep of
    less than ``least_flops`` (T) waits until its oldest request has waited for ``max_wait_s``. ``kv_blocks``: slots of
    the worker's pool.
    """

    rule: SharingRule
    max_tokens: int
    least_flops: int
    max_s: float | None = None
    max_wait_s: float = 0.0
    kv_blocks: int = 0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FormedSweep:
    """``shared_blocks``: for each request, how many leading blocks another unfinished request of the worker promises
    too; the worker's pool keeps those. ``forest`` shares as the worker's will.
    """

    number: int
    tickets: Sequence[Ticket]
    shared_blocks: Sequence[int]
    forest: Forest


class WaitingRoom:
    """Requests that a worker was given, by age and by prefix."""

    def __init__(self) -> None:
        self._by_age: dict[int, Ticket] = {}
        self._new: list[Ticket] = []
        self._siblings = Siblings()

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, ticket: Ticket) -> None:
        self._by_age[ticket.id] = ticket
        self._new.append(ticket)

    def remove(self, ticket: Ticket) -> bool:
        """Take out a request; False: it is not here."""
        if self._by_age.pop(ticket.id, None) is None:
            return False
        self._siblings.add_all(self._new)
        self._new = []
        self._siblings.remove([ticket])
        return True

    def oldest(self) -> Ticket:
        return next(iter(self._by_age.values()))

    def take(self, bounds: SweepBounds, costs: RequestCosts) -> tuple[list[Ticket], Forest]:
        """The next sweep: the oldest request with its siblings, then the next oldest with its, as long as they fit.
        At least one request, whatever it takes; none may be beyond ``max_tokens`` by itself.
        """
        self._siblings.add_all(self._new)
        self._new = []
        draft = _Draft(bounds, costs)
        passed_over = 0
        for ticket in self._by_age.values():
            if ticket.id in draft.taken:
                continue
            if not draft.add_group(self._siblings, ticket):
                passed_over += 1
                if passed_over == _MAX_PASSED_OVER:
                    break
        tickets, forest = draft.fitted()
        for ticket in tickets:
            del self._by_age[ticket.id]
        self._siblings.remove(tickets)
        return tickets, forest


class _Added(NamedTuple):
    """What a request adds to a sweep: blocks that are new in it, tokens to be computed, predicted time."""

    ticket: Ticket
    blocks: Sequence[Digest]
    tokens: int
    ns: int


@dataclass(slots=True)
class _Draft:
    """A sweep that is being filled. Its size is an estimate, in whole blocks; ``fitted`` looks at the forest."""

    bounds: SweepBounds
    costs: RequestCosts
    taken: dict[int, Ticket] = field(default_factory=dict)
    blocks: dict[Digest, None] = field(default_factory=dict)
    tokens: int = 0
    ns: int = 0

    def add_group(self, siblings: Siblings, first: Ticket) -> bool:
        """Add a request and its siblings: all of them, or as many as fit where the sweep is still less than half full.
        False: not all of them fit.
        """
        added: list[_Added] = []
        is_half_full = 2 * self.tokens > self.bounds.max_tokens
        for ticket, _ in siblings.of(first):
            if ticket.id in self.taken:
                continue
            new = self._added(ticket)
            if self.taken and not self._fits(new):
                if is_half_full:
                    self._undo(added)
                return False
            self._add(new)
            added.append(new)
        return True

    def _added(self, ticket: Ticket) -> _Added:
        blocks = held_blocks(ticket.chain, len(ticket.chain), self.blocks)
        shared = BLOCK_TOKENS * blocks
        rule = self.bounds.rule
        if not rule.share or shared <= rule.merge_cost * (ticket.num_tokens - shared):
            shared = 0  # computing them once does not pay
        ns = self.costs.of(ticket, min(shared, ticket.num_tokens - 1)).ns
        return _Added(ticket, ticket.chain[blocks:], ticket.num_tokens - shared, ns)

    def _fits(self, new: _Added) -> bool:
        bounds = self.bounds
        return self.tokens + new.tokens <= bounds.max_tokens and (
            bounds.max_s is None or self.ns + new.ns <= 1e9 * bounds.max_s
        )

    def _add(self, new: _Added) -> None:
        self.taken[new.ticket.id] = new.ticket
        self.blocks.update(dict.fromkeys(new.blocks))
        self.tokens += new.tokens
        self.ns += new.ns

    def _undo(self, added: list[_Added]) -> None:
        for new in added:
            del self.taken[new.ticket.id]
            for digest in new.blocks:
                del self.blocks[digest]
            self.tokens -= new.tokens
            self.ns -= new.ns

    def fitted(self) -> tuple[list[Ticket], Forest]:
        """The requests whose forest is within the bound; the last ones stay where the estimate was too low."""
        tickets = list(self.taken.values())
        while True:
            forest = build_forest([t.request.tokens for t in tickets], self.bounds.rule, [t.share_key for t in tickets])
            excess = forest.num_tokens - self.bounds.max_tokens
            if excess <= 0 or len(tickets) == 1:
                assert excess <= 0, (tickets[0].num_tokens, self.bounds.max_tokens)
                return tickets, forest
            while excess > 0 and len(tickets) > 1:
                excess -= tickets.pop().num_tokens
