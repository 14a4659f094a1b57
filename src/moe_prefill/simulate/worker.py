"""A worker that computes nothing: its pool is real, its time comes from the cost model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..blocks import BLOCK_TOKENS, BlockEvents, BlockPool
from ..costmodel import Batch, Rows, runs_of
from ..frontend import FormedSweep
from .timing import SweepTimer


@dataclass(frozen=True, slots=True)
class Computation:
    """One sweep on its way. ``tokens`` are those that are computed, after sharing and hits in the pool."""

    sweep: FormedSweep
    hits: tuple[int, ...]  # blocks of each request that the pool had
    tokens: int
    flops: int
    start_s: float
    seconds: float


class SimulatedWorker:
    """Computes one sweep after the other."""

    def __init__(self, index: int, timer: SweepTimer, *, generation: int = 0) -> None:
        self.index = index
        self.pool = BlockPool(index, timer.machine.kv_blocks, generation=generation)
        self.busy_s = 0.0
        self.running: Computation | None = None
        self._timer = timer
        self._is_first = True

    def start(self, sweep: FormedSweep, now_s: float) -> Computation:
        """Begin a sweep; it ends ``seconds`` later, when ``finish`` is to be called."""
        assert self.running is None
        pool = self.pool
        hits = tuple(pool.match(ticket.chain, ticket.usable_blocks) for ticket in sweep.tickets)
        for ticket, blocks in zip(sweep.tickets, hits, strict=True):
            pool.hold(ticket.chain[:blocks])
        batch = _batch(sweep, hits)
        time = self._timer.time(batch)
        seconds = time.compute_s + (time.exposed_first_s if self._is_first else time.exposed_s)
        self._is_first = False
        self.busy_s += seconds
        self.running = Computation(sweep, hits, batch.num_tokens, time.flops, now_s, seconds)
        return self.running

    def finish(self) -> BlockEvents:
        """The sweep is computed; what changed in the pool."""
        assert self.running is not None
        sweep, hits = self.running.sweep, self.running.hits
        for ticket, blocks in zip(sweep.tickets, hits, strict=True):
            self.pool.release(ticket.chain[:blocks])
        self.pool.store([ticket.chain for ticket in sweep.tickets], sweep.shared_blocks)
        self.running = None
        return self.pool.take_events()


def _batch(sweep: FormedSweep, hits: tuple[int, ...]) -> Batch:
    """The segments of the sweep's forest, less what lies in the pool and nobody computes."""
    forest, lengths = sweep.forest, np.asarray([ticket.num_tokens for ticket in sweep.tickets])
    rows = runs_of(forest, forest.needed_rows(lengths, BLOCK_TOKENS * np.asarray(hits, np.int64)))
    carried = Rows.of([t.first_asked for t in sweep.tickets], [t.asked for t in sweep.tickets])
    return Batch(rows, carried, carried.num_rows, sum(ticket.head_rows for ticket in sweep.tickets))
