"""In which order the router takes up what waits."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from ..blocks import BLOCK_TOKENS
from .costs import RequestCosts
from .siblings import Siblings
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
