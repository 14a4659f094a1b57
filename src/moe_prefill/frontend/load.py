"""L_i: the work that a worker has been given and has not done, booked by request."""

from __future__ import annotations

from collections.abc import Sequence

from .costs import Cost
from .ticket import Ticket


class Load:
    """Bookings of one worker. All sums are integers, so an idle worker's are exactly 0.

    A request is ``waiting`` from when it is booked, ``running`` from when its sweep starts. A sweep's bookings are
    released pro rata while it runs and in full when it ends. ``flops`` is L_i, ``ns`` the same in predicted time.
    """

    def __init__(self) -> None:
        self._booked: dict[int, tuple[Cost, int]] = {}  # cost and tokens, by request
        self._sweeps: dict[int, list[int]] = {}  # requests of each sweep that runs, by its number
        self._totals: dict[int, Cost] = {}
        self._released: dict[int, Cost] = {}
        self.flops = self.ns = self.tokens = 0
        self.waiting = self.running = 0

    @property
    def idle(self) -> bool:
        return not self._booked

    @property
    def waiting_flops(self) -> int:
        """Of requests whose sweep has not started."""
        return self.flops - sum(self._totals[n].flops - self._released[n].flops for n in self._totals)

    def book(self, ticket: Ticket, cost: Cost) -> None:
        assert ticket.id not in self._booked, ticket.id
        self._booked[ticket.id] = cost, ticket.num_tokens
        self._add(cost.flops, cost.ns, ticket.num_tokens)
        self.waiting += 1

    def start(self, number: int, ids: Sequence[int]) -> None:
        """Sweep ``number`` of these requests runs."""
        costs = [self._booked[id][0] for id in ids]
        self._sweeps[number] = list(ids)
        self._totals[number] = Cost(sum(cost.flops for cost in costs), sum(cost.ns for cost in costs))
        self._released[number] = Cost(0, 0)
        self.waiting -= len(ids)
        self.running += len(ids)

    def progress(self, number: int, done: int, of: int) -> None:
        """``done`` parts of ``of`` of a sweep are computed; what was reported before counts, if it was more."""
        assert 0 <= done <= of, (done, of)
        total, before = self._totals[number], self._released[number]
        now = Cost(max(before.flops, total.flops * done // of), max(before.ns, total.ns * done // of))
        self._released[number] = now
        self._add(before.flops - now.flops, before.ns - now.ns, 0)

    def predicted_ns(self, number: int) -> int:
        """Predicted time of a sweep that runs."""
        return self._totals[number].ns

    def left_ns(self, number: int) -> int:
        """Predicted time of what a sweep that runs has still to do."""
        return self._totals[number].ns - self._released[number].ns

    def finish(self, number: int) -> list[int]:
        """A sweep has ended; its requests."""
        ids = self._sweeps.pop(number)
        total, released = self._totals.pop(number), self._released.pop(number)
        tokens = sum(self._booked.pop(id)[1] for id in ids)
        self._add(released.flops - total.flops, released.ns - total.ns, -tokens)
        self.running -= len(ids)
        return ids

    def has(self, id: int) -> bool:
        return id in self._booked

    def cancel(self, id: int) -> None:
        """A waiting request is taken away."""
        cost, tokens = self._booked.pop(id)
        self._add(-cost.flops, -cost.ns, -tokens)
        self.waiting -= 1

    def _add(self, flops: int, ns: int, tokens: int) -> None:
        self.flops += flops
        self.ns += ns
        self.tokens += tokens
