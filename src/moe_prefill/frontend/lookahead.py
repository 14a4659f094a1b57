"""The order in which ours takes up what waits: siblings together, long ones late but in time."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..blocks import BLOCK_TOKENS, held_blocks
from ..forest import own_tokens
from .costs import RequestCosts
from .siblings import SIBLING_BLOCKS, Siblings
from .ticket import Ticket
from .worker import Worker

_NEW_PART = 8  # an epoch ends when more than one in this many of what waits is new
_PATIENCE = 8  # how often what waited when a request came may be given out before it
# What is kept for the end, in times of what the longest request that waits takes on every worker. With 1 loads come out
# even; twice that leaves room for what is predicted wrongly.
_RESERVE = 2


@dataclass(slots=True)
class _Waiting:
    """``ns``: predicted time after sharing. ``due``: when so many requests have been given out, this one goes first."""

    ticket: Ticket
    ns: int
    due: int


_Group = list[_Waiting]


class LookAhead:
    """What waits is put in order in **epochs**. Requests that share a prefix follow one another. Groups go by their
    longest request (by what it costs after sharing).

    ``long_first``: the end of a job, where there is no more choice, consists of short ones. ``postpone``: before that
    the shorter ones go first, as long as they are not needed at the end, since the longest lose most when a sibling
    comes after them. ``held_first``: before all others come those whose prefix a pool has; others would push it out.
    ``renew``: an epoch ends not only when it is through, but also when enough new ones wait, so that siblings that
    arrive apart meet.

    A request is overdue when ``_PATIENCE`` times as many as waited when it came have been given out. Overdue ones come
    before all others, the oldest first. So a request is overtaken by nine fillings of the queue at the most: those, and
    the rest of one epoch.
    """

    def __init__(
        self,
        costs: RequestCosts,
        *,
        long_first: bool = True,
        postpone: bool = True,
        held_first: bool = True,
        renew: bool = True,
    ) -> None:
        self._costs = costs
        self._long_first, self._postpone, self._held_first, self._renew = long_first, postpone, held_first, renew
        self._epoch: deque[_Waiting] = deque()
        self._next: list[_Waiting] = []  # in order of arrival
        self._given = 0
        self.remaining_ns = 0

    def __len__(self) -> int:
        return len(self._epoch) + len(self._next)

    def push(self, ticket: Ticket) -> None:
        waiting = self._waiting(ticket, _PATIENCE * (len(self) + 1))
        self._next.append(waiting)
        self.remaining_ns += waiting.ns

    def peek(self, workers: Sequence[Worker] = ()) -> Ticket:
        if not self._epoch or (self._renew and _NEW_PART * len(self._next) > len(self)):
            self._begin_epoch(workers)
        return self._epoch[0].ticket

    def pop(self) -> Ticket:
        self.peek()
        first = self._epoch.popleft()
        self.remaining_ns -= first.ns
        self._given += 1
        return first.ticket

    def push_back(self, tickets: Sequence[Ticket]) -> None:
        again = [self._waiting(ticket, 0) for ticket in tickets]
        self._epoch.extendleft(reversed(again))
        self.remaining_ns += sum(waiting.ns for waiting in again)

    def _waiting(self, ticket: Ticket, patience: int) -> _Waiting:
        return _Waiting(ticket, self._costs.of(ticket, 0).ns, self._given + patience)

    def _begin_epoch(self, workers: Sequence[Worker]) -> None:
        is_behind = bool(self._epoch)
        everything = [*self._epoch, *self._next]
        overdue = [waiting for waiting in everything if waiting.due <= self._given]
        overdue.sort(key=lambda waiting: waiting.ticket.id)
        groups = self._groups([waiting for waiting in everything if waiting.due > self._given])
        if not self._long_first:
            groups.sort(key=_age)
        else:
            groups.sort(key=lambda group: (-_longest(group), _age(group)))
            if self._postpone and is_behind:
                groups = _postponed(groups, max(1, len(workers)))
        if self._held_first:
            groups.sort(key=lambda group: not any(_holds(worker, group[0].ticket) for worker in workers))
        self._epoch = deque(waiting for group in (overdue, *groups) for waiting in group)
        self._next = []
        self.remaining_ns = sum(waiting.ns for waiting in self._epoch)

    def _groups(self, waiting: Sequence[_Waiting]) -> list[_Group]:
        """Siblings together, with what each adds to them."""
        siblings, by_id = Siblings(), {w.ticket.id: w for w in waiting}
        siblings.add_all([w.ticket for w in waiting])
        order = list(siblings.in_order())
        lengths, shared = [ticket.num_tokens for ticket, _ in order], [BLOCK_TOKENS * blocks for _, blocks in order]
        groups: list[_Group] = []
        own = own_tokens(lengths, shared, self._costs.rule).tolist()
        for (ticket, blocks), tokens in zip(order, own, strict=True):
            if blocks < SIBLING_BLOCKS:
                groups.append([])
            begin = min(ticket.num_tokens - tokens, BLOCK_TOKENS * ticket.usable_blocks)
            each = by_id[ticket.id]
            each.ns = self._costs.of(ticket, begin).ns
            groups[-1].append(each)
        return groups


def _age(group: _Group) -> int:
    """Of its oldest request, by number."""
    return min(waiting.ticket.id for waiting in group)


def _longest(group: _Group) -> int:
    return max(waiting.ns for waiting in group)


def _postponed(groups: Sequence[_Group], workers: int) -> list[_Group]:
    """Groups that come with the longest first. Of the shortest as much is kept for the end as makes loads even after
    the longest one; the others go first, the shortest of them first; and so on with what was kept.
    """
    groups = groups[::-1]
    work = list(accumulate(sum(waiting.ns for waiting in group) for group in groups))
    order: list[_Group] = []
    end = len(groups)
    while end:
        kept = bisect_left(work, _RESERVE * workers * _longest(groups[end - 1]), 0, end) + 1
        begin = min(kept, end - 1)
        order += groups[begin:end]
        end = begin
    return order


def _holds(worker: Worker, ticket: Ticket) -> bool:
    """Whether a worker's pool has enough of a request to make it worth a place."""
    return held_blocks(ticket.chain, ticket.usable_blocks, worker.table.committed) >= SIBLING_BLOCKS
