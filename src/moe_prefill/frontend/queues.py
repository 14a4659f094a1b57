"""In which order the router takes up what waits."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from ..blocks import BLOCK_TOKENS, held_blocks
from ..forest import own_tokens
from .costs import RequestCosts
from .siblings import SIBLING_BLOCKS, Siblings
from .ticket import Ticket
from .worker import Worker


class Queue(Protocol):
    """Requests that no worker has been given. ``remaining_ns``: predicted time of all of them on one worker."""

    remaining_ns: int

    def __len__(self) -> int: ...

    def push(self, ticket: Ticket) -> None: ...

    def peek(self, workers: Sequence[Worker] = ()) -> Ticket:
        """The next request, where these workers are to compute it. The queue is not empty."""
        ...

    def pop(self) -> Ticket:
        """Take out the one that ``peek`` shows."""
        ...

    def push_back(self, tickets: Sequence[Ticket]) -> None:
        """Requests that were taken out return, because their worker was lost: they come first."""
        ...


class Fifo:
    """In order of arrival."""

    def __init__(self, costs: RequestCosts) -> None:
        self._waiting: deque[Ticket] = deque()
        self._costs = costs
        self.remaining_ns = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)
        self.remaining_ns += self._costs.of(ticket, 0).ns

    def peek(self, workers: Sequence[Worker] = ()) -> Ticket:
        return self._waiting[0]

    def pop(self) -> Ticket:
        ticket = self._waiting.popleft()
        self.remaining_ns -= self._costs.of(ticket, 0).ns
        return ticket

    def push_back(self, tickets: Sequence[Ticket]) -> None:
        self._waiting.extendleft(reversed(tickets))
        self.remaining_ns += sum(self._costs.of(ticket, 0).ns for ticket in tickets)


class LookAhead:
    """Siblings together, groups with long requests first, and before all those whose prefix a pool has: others would
    push it out.

    What waits is put in order in **epochs**: an epoch is all that waits when the one before it is through. Within one,
    requests that share a prefix follow one another, and groups go by their longest request (by what it costs after
    sharing), so that the end of a job, where there is no more choice, consists of short ones. So a request is
    overtaken at most by those that wait when it comes or come before the epoch is through that runs then: never by
    more than two fillings of the queue.
    """

    def __init__(self, costs: RequestCosts, *, long_first: bool = True, held_first: bool = True) -> None:
        self._costs, self._long_first, self._held_first = costs, long_first, held_first
        self._epoch: deque[tuple[Ticket, int]] = deque()  # with the predicted time after sharing
        self._next: list[tuple[Ticket, int]] = []
        self.remaining_ns = 0

    def __len__(self) -> int:
        return len(self._epoch) + len(self._next)

    def push(self, ticket: Ticket) -> None:
        cost_ns = self._costs.of(ticket, 0).ns
        self._next.append((ticket, cost_ns))
        self.remaining_ns += cost_ns

    def peek(self, workers: Sequence[Worker] = ()) -> Ticket:
        if not self._epoch:
            self._begin_epoch(workers)
        return self._epoch[0][0]

    def pop(self) -> Ticket:
        self.peek()
        ticket, cost_ns = self._epoch.popleft()
        self.remaining_ns -= cost_ns
        return ticket

    def push_back(self, tickets: Sequence[Ticket]) -> None:
        again = [(ticket, self._costs.of(ticket, 0).ns) for ticket in tickets]
        self._epoch.extendleft(reversed(again))
        self.remaining_ns += sum(cost_ns for _, cost_ns in again)

    def _begin_epoch(self, workers: Sequence[Worker]) -> None:
        siblings = Siblings()
        siblings.add_all([ticket for ticket, _ in self._next])
        order = list(siblings.in_order())
        lengths, shared = [ticket.num_tokens for ticket, _ in order], [BLOCK_TOKENS * blocks for _, blocks in order]
        groups: list[list[tuple[Ticket, int]]] = []
        own = own_tokens(lengths, shared, self._costs.rule).tolist()
        for (ticket, blocks), tokens in zip(order, own, strict=True):
            if blocks < SIBLING_BLOCKS:
                groups.append([])
            begin = min(ticket.num_tokens - tokens, BLOCK_TOKENS * ticket.usable_blocks)
            groups[-1].append((ticket, self._costs.of(ticket, begin).ns))
        if self._long_first:
            groups.sort(key=lambda group: (-max(cost_ns for _, cost_ns in group), min(t.id for t, _ in group)))
        else:
            groups.sort(key=lambda group: min(ticket.id for ticket, _ in group))
        if self._held_first:
            groups.sort(key=lambda group: not any(_holds(worker, group[0][0]) for worker in workers))
        self._epoch.extend(each for group in groups for each in group)
        self._next = []
        self.remaining_ns = sum(cost_ns for _, cost_ns in self._epoch)


class ShortestFirst:
    """PrefillOnly's order: the fewest tokens that are not cached first. When a request is taken, those that share
    with it become shorter.
    """

    def __init__(self, costs: RequestCosts) -> None:
        self._costs = costs
        self._heap: list[tuple[int, int, int, Ticket]] = []  # tokens left, id, a serial number, the request
        self._serial = 0
        self._matched: dict[int, int] = {}  # blocks, by request that waits
        self._siblings = Siblings()
        self._new: list[Ticket] = []
        self.remaining_ns = 0

    def __len__(self) -> int:
        return len(self._matched)

    def push(self, ticket: Ticket) -> None:
        self._new.append(ticket)
        self._enter(ticket, 0)
        self.remaining_ns += self._costs.of(ticket, 0).ns

    def peek(self, workers: Sequence[Worker] = ()) -> Ticket:
        while True:
            tokens, _, _, ticket = self._heap[0]
            if self._left(ticket) == tokens:
                return ticket
            heapq.heappop(self._heap)  # it has become shorter, or is gone

    def pop(self) -> Ticket:
        ticket = self.peek()
        heapq.heappop(self._heap)
        self._siblings.add_all(self._new)
        self._new = []
        for sibling, blocks in self._siblings.of(ticket):
            if sibling is not ticket:
                if self._matched[sibling.id] >= blocks:
                    break  # so have those further away
                self._enter(sibling, blocks)
        self._siblings.remove([ticket])
        del self._matched[ticket.id]
        self.remaining_ns -= self._costs.of(ticket, 0).ns
        return ticket

    def push_back(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.push(ticket)

    def _enter(self, ticket: Ticket, blocks: int) -> None:
        self._matched[ticket.id] = blocks
        self._serial += 1
        heapq.heappush(self._heap, (self._left(ticket), ticket.id, self._serial, ticket))

    def _left(self, ticket: Ticket) -> int:
        blocks = self._matched.get(ticket.id)
        return -1 if blocks is None else ticket.num_tokens - BLOCK_TOKENS * min(blocks, ticket.usable_blocks)


def _holds(worker: Worker, ticket: Ticket) -> bool:
    """Whether a worker's pool has enough of a request to make it worth a place."""
    return held_blocks(ticket.chain, ticket.usable_blocks, worker.table.committed) >= SIBLING_BLOCKS
