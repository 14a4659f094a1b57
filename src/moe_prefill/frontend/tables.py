"""What the router believes of one worker's prefixes."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence

from ..blocks import BLOCK_TOKENS, BlockChange, BlockEvents, Chain, Digest, held_blocks
from ..forest import SharingRule
from .ticket import Ticket

_log = logging.getLogger(__name__)


class PrefixTable:
    """``committed``: the blocks of the worker's pool, least recent first, by its events. ``pending``: blocks that the
    worker's unfinished requests promise, with how many of them do.

    A block is promised when its request is routed, and no longer when that request is finished or taken away, or when
    it is part of a sweep and the pool will not store the block; by the end of the sweep the worker's events have put
    what was stored into ``committed``. What does not fit in the events is counted in
    ``oddities`` under its name, logged, and changes nothing else.
    """

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.generation = 0
        self.committed: OrderedDict[Digest, None] = OrderedDict()
        self.pending: dict[Digest, int] = {}
        self.oddities: Counter[str] = Counter()
        self.trusted = True  # False: events were lost, and a snapshot is needed
        self._next_number = 0

    def match(self, chain: Chain, limit: int) -> int:
        """How many leading blocks, at most ``limit``, are here or will be."""
        return held_blocks(chain, limit, self.committed, self.pending)

    def spared(self, ticket: Ticket, blocks: int, rule: SharingRule) -> int:
        """How many of the ``blocks`` that match the worker will not compute for a request: those that its pool holds,
        and of those that are promised as many as the forest of a sweep shares, if all that promised them are in one.
        """
        held = held_blocks(ticket.chain, blocks, self.committed) if self.committed else 0
        while blocks > held:
            others = self.pending[ticket.chain[blocks - 1]]
            begin = self._first_promised(ticket.chain, others, held, blocks - 1)
            below = (others + 1) * (ticket.num_tokens - BLOCK_TOKENS * blocks)
            run = BLOCK_TOKENS * (blocks - begin)
            if rule.pays(run=run, children=others + 1, depth=0, tokens_below=below, segments_below=others + 1):
                break
            blocks = begin
        return blocks

    def _first_promised(self, chain: Chain, most: int, low: int, high: int) -> int:
        """The first block from ``low`` on that is promised at most ``most`` times; ``high`` is."""
        while low < high:
            middle = (low + high) // 2
            if self.pending[chain[middle]] <= most:
                high = middle
            else:
                low = middle + 1
        return low

    def promise(self, chain: Chain) -> None:
        pending = self.pending
        for digest in chain:
            pending[digest] = pending.get(digest, 0) + 1

    def forget(self, chain: Chain) -> None:
        """A request that promised these blocks is finished or taken away."""
        pending = self.pending
        for digest in chain:
            left = pending[digest] - 1
            if left:
                pending[digest] = left
            else:
                del pending[digest]

    def wanted_by_others(self, chain: Chain) -> int:
        """How many leading blocks of an unfinished request another unfinished one promises too."""
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high + 1) // 2
            if self.pending[chain[middle - 1]] > 1:
                low = middle
            else:
                high = middle - 1
        return low

    def apply(self, events: BlockEvents) -> bool:
        """Follow the worker's pool. False: the events were not used."""
        if events.generation < self.generation:
            return self._odd("stale", f"generation {events.generation}, the worker is in its {self.generation}")
        if events.generation > self.generation:
            self._odd("restarted", f"generation {events.generation} after {self.generation}")
            self.restart(events.generation)
        if events.number < self._next_number:
            return self._odd("repeated", f"message {events.number}, {self._next_number} comes next")
        if events.number > self._next_number and not events.snapshot:
            self._odd("lost", f"message {events.number} came where {self._next_number} was due")
            self.trusted = False
        self._next_number = events.number + 1
        if events.snapshot:
            self.committed.clear()
            self.trusted = True
        for change in events.changes:
            self._change(change)
        return True

    def restart(self, generation: int) -> None:
        """A new life of the worker begins, with an empty pool. Promises stay until their requests are taken away."""
        self.generation, self._next_number, self.trusted = generation, 0, True
        self.committed.clear()

    def audit(self, pool: Sequence[Digest]) -> list[str]:
        """How this table differs from a pool (least recent first) while the worker is idle and no event is on its
        way; empty: not at all.
        """
        believed, found = list(self.committed), []
        missing, extra = set(pool) - set(believed), set(believed) - set(pool)
        if missing:
            found.append(f"{len(missing)} blocks of the pool are not in the table")
        if extra:
            found.append(f"{len(extra)} blocks of the table are not in the pool")
        if not found and believed != list(pool):
            found.append("the blocks are the same and their order is not")
        if self.pending:
            found.append(f"{len(self.pending)} blocks are promised and no request is unfinished")
        return found

    def _change(self, change: BlockChange) -> None:
        committed = self.committed
        for digest in change.digests:
            known = digest in committed
            if change.kind == "stored":
                if known:
                    self._odd("stored twice", digest.hex())
                committed[digest] = None
            elif not known:
                self._odd(f"unknown block {change.kind}", digest.hex())
            elif change.kind == "used":
                committed.move_to_end(digest)
            else:
                del committed[digest]

    def _odd(self, name: str, what: str) -> bool:
        self.oddities[name] += 1
        if self.oddities[name] == 1:
            _log.warning("events of worker %d: %s (%s); further ones are only counted", self.worker, name, what)
        return False
