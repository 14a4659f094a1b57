"""A batch as the cost model sees it: which positions are computed, whoever asked for them.

A row at position p of its request sees p + 1 keys (or its window), wherever they were computed. So a segment is a run
of positions: its ancestors are all positions before it, and attention is exact under sharing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core import AtomicRequest, Int64Array
from ..forest import Forest, SharingRule, build_forest


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Runs of rows, int64 [N] each: run i holds positions ``first[i]`` to ``first[i] + length[i] - 1``, and there are
    ``count[i]`` such runs.
    """

    first: Int64Array
    length: Int64Array
    count: Int64Array

    @classmethod
    def of(cls, first: npt.ArrayLike, length: npt.ArrayLike, count: npt.ArrayLike = 1) -> Rows:
        """From arrays of one shape, or scalars for all; empty runs are left out."""
        shape = np.atleast_1d
        runs = np.broadcast_arrays(*(shape(np.asarray(array, np.int64)) for array in (first, length, count)))
        some = (runs[1] > 0) & (runs[2] > 0)
        return cls(*(run[some] for run in runs))

    @property
    def num_rows(self) -> int:
        return int((self.length * self.count).sum())

    def pairs(self, window: int | None) -> Int64Array:
        """(query, key) pairs that one run of each kind sees, [N]."""
        return _triangle(self.first + self.length, window) - _triangle(self.first, window)

    def keys(self, window: int | None) -> Int64Array:
        """Keys that one run of each kind reads, [N]."""
        everything = self.first + self.length
        return everything if window is None else np.minimum(everything, self.length + window - 1)

    def num_pairs(self, window: int | None) -> int:
        return int((self.pairs(window) * self.count).sum())


def _triangle(rows: Int64Array, window: int | None) -> Int64Array:
    """Pairs of the first ``rows`` positions of a request: the sum of min(i, window) for i = 1 .. rows."""
    inside = rows if window is None else np.minimum(rows, window)
    beyond = 0 if window is None else (rows - inside) * window
    pairs: Int64Array = inside * (inside + 1) // 2 + beyond
    return pairs


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one sweep computes.

    ``rows``: the segments after sharing. ``carried``: the runs that the last layer carries beyond K and V.
    ``asked_rows``: rows that the LM head reads, ``head_rows``: LM head rows asked, summed over them.
    """

    rows: Rows
    carried: Rows
    asked_rows: int
    head_rows: int

    @property
    def num_tokens(self) -> int:
        return self.rows.num_rows

    @classmethod
    def uniform(
        cls, tokens: int, tokens_per_request: int, *, prune_last: bool = True, head_rows_per_request: int = 2
    ) -> Batch:
        """``tokens`` tokens as requests of ``tokens_per_request`` that share nothing, the last one shorter if need be.

        Each asks ``head_rows_per_request`` candidates after its last token, the only row that the last layer carries
        unless ``prune_last`` is off.
        """
        assert tokens > 0 < tokens_per_request, (tokens, tokens_per_request)
        whole, rest = divmod(tokens, tokens_per_request)
        length, count = np.asarray([tokens_per_request, rest]), np.asarray([whole, rest > 0])
        rows = Rows.of(0, length, count)
        requests = int(rows.count.sum())
        carried = Rows.of(rows.length - 1, 1, rows.count) if prune_last else rows
        return cls(rows, carried, requests, requests * head_rows_per_request)

    def times(self, count: int) -> Batch:
        """The same work ``count`` times over, nothing shared between the copies."""
        rows, carried = (Rows(r.first, r.length, r.count * count) for r in (self.rows, self.carried))
        return Batch(rows, carried, self.asked_rows * count, self.head_rows * count)

    @classmethod
    def from_requests(
        cls,
        requests: Sequence[AtomicRequest],
        salts: Sequence[str],
        rule: SharingRule,
        vocab_size: int,
        held: Sequence[int] | None = None,
    ) -> Batch:
        """One sweep of these requests: shared as ``rule`` says, every asked position carried and read once. ``held``:
        how many leading tokens of each have their K and V in the pool.
        """
        forest = build_forest([request.tokens for request in requests], rule, salts)
        counts = [len(request.positions) for request in requests]
        owner, positions = np.repeat(np.arange(len(requests)), counts), np.concatenate([r.positions for r in requests])
        asked = forest.rows_of(owner, positions.astype(np.int64))
        vocabulary = np.repeat([request.vocabulary for request in requests], counts)
        pairs_asked = np.concatenate([np.diff(request.id_offsets) for request in requests])
        pairs = np.repeat(asked * vocab_size, pairs_asked) + np.concatenate([request.ids for request in requests])
        few = np.unique(pairs[~np.repeat(vocabulary, pairs_asked)])  # (row, id) pairs asked by themselves
        head_rows = len(np.unique(asked[vocabulary])) * vocab_size + len(few)
        carried, computed = np.unique(asked), None
        if held is not None:
            lengths = np.asarray([len(request.tokens) for request in requests])
            computed = forest.needed_rows(lengths, np.asarray(held, np.int64))
        return cls.from_forest(forest, carried, computed=computed, asked_rows=len(carried), head_rows=head_rows)

    @classmethod
    def from_forest(
        cls,
        forest: Forest,
        carried: Int64Array,
        *,
        computed: Int64Array | None = None,
        asked_rows: int,
        head_rows: int,
    ) -> Batch:
        """The segments of a forest; ``carried``: packed rows that the last layer carries, ascending; ``computed``: the
        rows that are not in the pool, all by default.
        """
        segments = Rows.of(forest.first_position, forest.stop - forest.start)
        rows = segments if computed is None else runs_of(forest, computed)
        return cls(rows, runs_of(forest, carried), asked_rows, head_rows)


def runs_of(forest: Forest, rows: Int64Array) -> Rows:
    """Ascending packed rows of a forest as runs, each within a segment."""
    owner = forest.segment_of_rows(rows)
    begins = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(owner, prepend=-1) != 0))
    return Rows.of(forest.positions[rows[begins]], np.diff(begins, append=len(rows)))
