"""The bookkeeping of a worker's paged KV pool: which block lies in which slot, who reads it, who goes first.

What is stored: the prefix of a request that another unfinished request of this worker has promised too (the frontend
says how long it is), because it has been shown to be shared. Blocks that only one request has are stored when all such
blocks of a sweep take at most a quarter of the pool, so that a small sweep leaves its prompts behind for the next
question and a large one does not wash the pool out.

A block is always more recent than the blocks that continue it. So eviction takes the ends of prefixes first, and the
pool is closed under prefixes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from .events import BlockChange, BlockEvents, ChangeKind
from .hashes import Chain, Digest, held_blocks

_ONE_OFF_SHARE = 4  # one-off blocks of a sweep may take this part of the pool
_UNTAKEN = 4  # changes of as many blocks as fill the pool this often are not kept for anybody


class BlockPool:
    """``capacity`` slots of 16 tokens. LRU; what a running sweep reads stays. One thread owns it."""

    def __init__(self, worker: int, capacity: int, *, generation: int = 0) -> None:
        self.worker, self.capacity, self.generation = worker, capacity, generation
        self._slots: OrderedDict[Digest, int] = OrderedDict()  # least recent first
        self._free = list(range(capacity - 1, -1, -1))
        self._readers: dict[Digest, int] = {}
        self._changes: list[BlockChange] = []
        self._changed = 0  # blocks in them
        self._unheard = False  # more has changed than is kept for a listener
        self._number = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._slots

    def match(self, chain: Chain, limit: int) -> int:
        """How many leading blocks of ``chain`` are here, at most ``limit``."""
        return held_blocks(chain, limit, self._slots)

    def slots(self, chain: Chain) -> list[int]:
        """Where these blocks lie; all of them must be here."""
        return [self._slots[digest] for digest in chain]

    def hold(self, chain: Chain) -> None:
        """Keep these blocks until ``release``: a sweep reads them."""
        for digest in chain:
            self._readers[digest] = self._readers.get(digest, 0) + 1

    def release(self, chain: Chain) -> None:
        for digest in chain:
            left = self._readers[digest] - 1
            if left:
                self._readers[digest] = left
            else:
                del self._readers[digest]

    def store(self, chains: Sequence[Chain], shared: Sequence[int]) -> list[Digest]:
        """Take in what a sweep computed and may be asked for again; returns the new blocks, whose slots are to be
        filled. ``chains``: of its requests; ``shared`` of each: how many leading blocks another request promised too.
        """
        kept = list(kept_blocks(chains, shared, self.capacity))
        kept.reverse()  # the least wanted first, and every block behind the ones that continue it
        new = [digest for digest in kept if digest not in self._slots]
        new = new[len(new) - self._make_room(len(new), set(kept)) :]
        for digest in new:
            self._slots[digest] = self._free.pop()
        self._record("stored", new)
        used = [digest for digest in kept if digest in self._slots]
        for digest in used:
            self._slots.move_to_end(digest)
        self._record("used", used)
        return new

    def discard(self, chain: Chain) -> None:
        """Drop these blocks, with all that continue them: nothing was written for them."""
        for digest in chain:
            self._free.append(self._slots.pop(digest))
        self._record("evicted", chain)

    def take_events(self) -> BlockEvents:
        """What has changed since the last call; after a long time in which nobody asked, a snapshot."""
        if self._unheard:
            return self.snapshot()
        events = BlockEvents(
            worker=self.worker, generation=self.generation, number=self._number, changes=tuple(self._changes)
        )
        self._number += 1
        self._changes, self._changed = [], 0
        return events

    def snapshot(self) -> BlockEvents:
        """The whole pool; changes that were not taken are in it."""
        self._changes, self._unheard = [BlockChange("stored", tuple(self._slots))], False
        events = self.take_events()
        return BlockEvents(
            worker=events.worker,
            generation=events.generation,
            number=events.number,
            changes=events.changes,
            snapshot=True,
        )

    def _make_room(self, wanted: int, keep: set[Digest]) -> int:
        """Evict until ``wanted`` slots are free, or nothing more may go; returns how many of them are."""
        evicted: list[Digest] = []
        for digest in self._slots:
            if len(self._free) + len(evicted) >= wanted:
                break
            if digest not in self._readers and digest not in keep:
                evicted.append(digest)
        for digest in evicted:
            self._free.append(self._slots.pop(digest))
        self._record("evicted", evicted)
        return min(wanted, len(self._free))

    def _record(self, kind: ChangeKind, digests: Sequence[Digest]) -> None:
        if not digests or self._unheard:
            return
        self._changes.append(BlockChange(kind, tuple(digests)))
        self._changed += len(digests)
        if self._changed > _UNTAKEN * max(self.capacity, 256):
            self._changes, self._unheard = [], True


def kept_blocks(chains: Sequence[Chain], shared: Sequence[int], capacity: int) -> dict[Digest, None]:
    """The blocks of a sweep that a pool of ``capacity`` slots takes in, the most wanted first, each behind those that
    it continues. ``chains`` and ``shared`` as for ``BlockPool.store``.
    """
    if not capacity:
        return {}
    wanted = _closed(zip(chains, shared, strict=True), {})
    with_all = _closed(((chain, len(chain)) for chain in chains), dict(wanted))
    if len(with_all) - len(wanted) <= capacity // _ONE_OFF_SHARE:
        wanted = with_all
    return dict.fromkeys(islice(wanted, capacity))


def _closed(prefixes: Iterable[tuple[Chain, int]], found: dict[Digest, None]) -> dict[Digest, None]:
    """Add the blocks of these prefixes to ``found``, each behind the ones that it continues."""
    for chain, length in prefixes:
        known = held_blocks(chain, length, found)
        found.update(dict.fromkeys(chain[known:length]))
    return found
