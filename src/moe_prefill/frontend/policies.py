"""Which worker gets a request: ours, the paper's rule, and what other systems do, behind one interface.

A policy brings the queue from which the router takes requests and chooses a worker for the one in front, or nobody for
now. Rules that hold requests back say how much a worker may have; the others hand on what comes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..blocks import BLOCK_TOKENS, Digest, held_blocks
from .costs import Cost, RequestCosts
from .lookahead import LookAhead
from .queues import Fifo, Queue, ShortestFirst
from .siblings import SIBLING_BLOCKS
from .ticket import Ticket
from .worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """FLOPs that a worker is given: ``saturated`` is T, ``full`` fill sweeps up to the memory bound."""

    saturated: int
    full: int


class Policy(Protocol):
    """One rule. ``workers`` are those that live, in order of their index; at least one."""

    name: str
    queue: Queue

    def choose(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker | None:
        """Who gets ``ticket``, the front of ``queue``, now; None: it has to wait."""
        ...

    def lost(self, worker: Worker) -> None:
        """A worker's prefixes are gone."""
        ...

    def limit(self, limits: Limits) -> None:
        """T has changed."""
        ...


class _Plain:
    """In order of arrival, nothing remembered."""

    name: str

    def __init__(self, costs: RequestCosts) -> None:
        self.queue: Queue = Fifo(costs)

    def lost(self, worker: Worker) -> None:
        pass

    def limit(self, limits: Limits) -> None:
        pass


class RoundRobin(_Plain):
    """One after the other."""

    name = "round-robin"
    _turn = -1

    def choose(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker | None:
        self._turn += 1
        return workers[self._turn % len(workers)]


class WaitingRunning(_Plain):
    """vLLM's data-parallel load balancer: the least of 4 x waiting + running requests."""

    name = "vllm"

    def choose(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker | None:
        return min(workers, key=lambda w: (4 * w.load.waiting + w.load.running, w.index))


class LeastTokens(_Plain):
    """The fewest tokens that are given and not finished."""

    name = "least-tokens"

    def choose(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker | None:
        return min(workers, key=lambda w: (w.load.tokens, w.index))


class CacheAware(_Plain):
    """SGLang's router: while request counts differ by more than ``balance_abs`` and by the factor ``balance_rel``, the
    worker with the fewest; else the one whose history has more than ``threshold`` of the request as a prefix; else the
    one with the smallest history.
    """

    name = "sglang"

    def __init__(
        self, costs: RequestCosts, *, threshold: float = 0.5, balance_abs: int = 32, balance_rel: float = 1.1
    ) -> None:
        super().__init__(costs)
        self.threshold, self.balance_abs, self.balance_rel = threshold, balance_abs, balance_rel
        self._history: dict[int, dict[Digest, None]] = {}  # all blocks ever given to a worker

    def choose(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker | None:
        counts = [w.load.waiting + w.load.running for w in workers]
        most, least = max(counts), min(counts)
        if most - least > self.balance_abs and most > self.balance_rel * least:
            chosen = workers[counts.index(least)]
        else:
            chosen = self._by_history(ticket, workers)
        self._of(chosen).update(dict.fromkeys(ticket.chain))
        return chosen

    def lost(self, worker: Worker) -> None:
        self._history.pop(worker.index, None)

    def _by_history(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker:
        blocks = [held_blocks(ticket.chain, len(ticket.chain), self._of(w)) for w in workers]
        best = max(blocks)
        if best * BLOCK_TOKENS > self.threshold * ticket.num_tokens:
            return workers[blocks.index(best)]
        return min(workers, key=lambda w: (len(self._of(w)), w.index))

    def _of(self, worker: Worker) -> dict[Digest, None]:
        return self._history.setdefault(worker.index, {})


class PaperRule:
    """Section 7: of the workers below T the one with the longest match, committed or pending; among equals, and where
    nothing matches, the one with the least load.
    """

    name = "paper"

    def __init__(self, costs: RequestCosts, limits: Limits) -> None:
        self.queue: Queue = Fifo(costs)
        self.limit(limits)

    def choose(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker | None:
        below = [w for w in workers if w.load.flops < self._limit]
        if not below:
            return None
        return min(below, key=lambda w: (-_blocks(w, ticket), w.load.flops, w.index))

    def lost(self, worker: Worker) -> None:
        pass

    def limit(self, limits: Limits) -> None:
        self._limit = limits.saturated


class ShortestPrefill:
    """PrefillOnly: the request with the fewest tokens that are not cached, to the least loaded worker below a full
    sweep.
    """

    name = "shortest-prefill"

    def __init__(self, costs: RequestCosts, limits: Limits) -> None:
        self.queue: Queue = ShortestFirst(costs)
        self.limit(limits)

    def choose(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker | None:
        below = [w for w in workers if w.load.flops < self._limit]
        if not below:
            return None
        return min(below, key=lambda w: (-_sibling_blocks(w, ticket), w.load.flops, w.index))

    def lost(self, worker: Worker) -> None:
        pass

    def limit(self, limits: Limits) -> None:
        self._limit = limits.full


@dataclass(frozen=True, slots=True, kw_only=True)
class Extensions:
    """What goes beyond the paper's rule; each can be switched off.

    ``look_ahead``: siblings in the queue are brought together; with it, ``long_first``: the end consists of short
    requests; ``postpone``: before that the long ones wait for the others; ``held_first``: before all those whose prefix
    a pool has; ``renew``: what comes is brought together with what waits already.
    ``memory_bound``: a worker takes work up to ``Limits.full`` instead of T. ``together``: where it has a prefix it may
    go beyond its bound by this many times what the match saves, so that siblings are not torn apart there. ``spill``:
    a worker that would be done later than all workers on average is passed over, even where it has the prefix; and
    where all that are below their bound would, the request waits for one that is done sooner, unless one of them idles.
    """

    look_ahead: bool = True
    long_first: bool = True
    postpone: bool = True
    held_first: bool = True
    renew: bool = True
    memory_bound: bool = True
    together: int = 2
    spill: bool = True


class Ours:
    """The paper's rule with its extensions.

    While much is queued the workers are busy anyway, so a request goes where it adds the least work. When what is left
    would be done sooner elsewhere it goes where it is done first: the average time at which all workers are done, if
    the rest were spread evenly, tells the two apart.
    """

    name = "ours"

    def __init__(self, costs: RequestCosts, limits: Limits, extensions: Extensions | None = None) -> None:
        self.extensions = on = extensions or Extensions()
        self.queue: Queue = Fifo(costs)
        if on.look_ahead:
            self.queue = LookAhead(
                costs,
                long_first=on.long_first,
                postpone=on.postpone,
                held_first=on.held_first,
                renew=on.renew,
            )
        self._costs = costs
        self.limit(limits)

    def choose(self, ticket: Ticket, workers: Sequence[Worker]) -> Worker | None:
        everyone = self._options(ticket, workers)
        options = [option for option in everyone if option.may_have_it]
        if not options:
            return None
        if self.extensions.spill:
            done_ns = (sum(w.load.ns for w in workers) + self.queue.remaining_ns) / len(workers)
            in_time = [option for option in options if option.done_ns <= done_ns]
            if not in_time:
                is_idle = any(option.worker.load.idle for option in options)
                first = min(options if is_idle else everyone, key=lambda option: option.done_ns)
                return first.worker if first.may_have_it else None
            options = in_time
        most = max(option.blocks for option in options)
        return min((o for o in options if o.blocks == most), key=lambda option: option.done_ns).worker

    def lost(self, worker: Worker) -> None:
        pass

    def limit(self, limits: Limits) -> None:
        self._limit = limits.full if self.extensions.memory_bound else limits.saturated

    def _options(self, ticket: Ticket, workers: Sequence[Worker]) -> list[_Option]:
        """What each worker would make of it."""
        costs: dict[int, Cost] = {0: self._costs.of(ticket, 0)}

        def cost(blocks: int) -> Cost:
            if blocks not in costs:
                costs[blocks] = self._costs.of(ticket, BLOCK_TOKENS * blocks)
            return costs[blocks]

        options = []
        for worker in workers:
            blocks = _blocks(worker, ticket)
            spared = worker.table.spared(ticket, blocks, self._costs.rule) if blocks else 0
            limit = self._limit + self.extensions.together * (costs[0].flops - cost(blocks).flops)
            done_ns = worker.load.ns + cost(spared).ns
            options.append(_Option(worker, blocks, done_ns, worker.load.flops < limit))
        return options


@dataclass(frozen=True, slots=True)
class _Option:
    """``blocks`` that ``worker`` has; ``done_ns``: predicted time until it has done everything and this request;
    ``may_have_it``: it is below its bound.
    """

    worker: Worker
    blocks: int
    done_ns: int
    may_have_it: bool


def _blocks(worker: Worker, ticket: Ticket) -> int:
    return worker.table.match(ticket.chain, ticket.usable_blocks)


def _sibling_blocks(worker: Worker, ticket: Ticket) -> int:
    """As ``_blocks``, but a match too short to be worth anything is none."""
    blocks = _blocks(worker, ticket)
    return blocks if blocks >= SIBLING_BLOCKS else 0


POLICIES = ("ours", "paper", "round-robin", "vllm", "least-tokens", "sglang", "shortest-prefill")


def make_policy(name: str, costs: RequestCosts, limits: Limits) -> Policy:
    """A policy by its name in ``POLICIES``."""
    plain: dict[str, type[_Plain]] = {kind.name: kind for kind in (RoundRobin, WaitingRunning, LeastTokens, CacheAware)}
    if name in plain:
        made: Policy = plain[name](costs)  # type: ignore[assignment]
        return made
    held: dict[str, type[Ours] | type[PaperRule] | type[ShortestPrefill]] = {
        kind.name: kind for kind in (Ours, PaperRule, ShortestPrefill)
    }
    return held[name](costs, limits)
