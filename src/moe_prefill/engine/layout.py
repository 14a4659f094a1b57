"""Which rows of a packed batch attend to which, as a few variable-length calls.

A row attends causally to its own segment and to all of every ancestor. The first ``levels`` ancestors of a path are
rectangular calls, one a level for all their descendants, merged by log-sum-exp; deeper ancestors are gathered in
front of the segment's own keys (the diagonal call). Under a sliding window everything is gathered, so that a path's
keys are one contiguous range. Numpy only.

A *run* is a contiguous piece of one segment whose rows ask as queries: a whole segment, the part of it that falls
into a chunk, what of it is not in the pool, or, in the last layer, the rows that somebody reads.

Keys are numbered by packed rows of the forest. Where rows come from the pool, they have keys and no residual, and the
residual's rows are numbered without them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..core import BoolArray, Int32Array, Int64Array
from ..forest import Forest


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Query rows as runs: ``segment`` [N], packed rows ``start`` to ``stop`` [N], in packed order and disjoint."""

    segment: Int64Array
    start: Int64Array
    stop: Int64Array

    @property
    def num_rows(self) -> int:
        return int((self.stop - self.start).sum())

    def __len__(self) -> int:
        return len(self.segment)

    def __getitem__(self, part: slice) -> Runs:
        return Runs(self.segment[part], self.start[part], self.stop[part])

    def rows(self) -> Int64Array:
        return ranges(self.start, self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One variable-length attention: entry i has queries ``cu_q[i]:cu_q[i+1]`` and keys ``cu_k[i]:cu_k[i+1]``.

    ``first_row``: where the queries begin among the chunk's rows. ``keys``: packed rows of the keys, a slice where
    they are contiguous. With ``causal`` the last query sees every key, the one before it all but the last, and so on
    (aligned at the end). ``merged``: which entries' results are merged with other calls', so need their log-sum-exp.
    """

    first_row: int
    cu_q: Int32Array
    cu_k: Int32Array
    keys: slice | Int64Array
    causal: bool
    window: int | None
    merged: BoolArray

    @property
    def num_rows(self) -> int:
        return int(self.cu_q[-1])

    @property
    def max_q(self) -> int:
        return int(np.diff(self.cu_q).max())

    @property
    def max_k(self) -> int:
        return int(np.diff(self.cu_k).max())


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Query rows that go through the rest of a layer together.

    ``rows``: their rows of the residual, a slice where contiguous. ``diagonal`` calls cover every row once;
    ``levels`` calls cover rows again with ancestors' keys, to be merged.
    """

    rows: slice | Int64Array
    num_rows: int
    diagonal: tuple[AttentionCall, ...]
    levels: tuple[AttentionCall, ...]


def ranges(start: Int64Array, stop: Int64Array) -> Int64Array:
    """Concatenation of ``arange(start[i], stop[i])``."""
    lengths = stop - start
    shift = np.repeat(start - (np.cumsum(lengths) - lengths), lengths)
    everything: Int64Array = np.arange(int(lengths.sum()), dtype=np.int64) + shift
    return everything


def all_runs(forest: Forest) -> Runs:
    """Every row asks."""
    return Runs(np.arange(forest.num_segments), forest.start, forest.stop)


def asked_runs(forest: Forest, rows: Int64Array) -> Runs:
    """Runs that cover ``rows`` (sorted, unique).

    Many short runs in one segment would each need the keys before them again; where those keys exceed four times the
    segment, the segment's rows from the first to the last asked one become a single run.
    """
    segment = forest.segment_of_rows(rows)
    cut = np.flatnonzero((np.diff(rows) != 1) | (np.diff(segment) != 0)) + 1
    first, last = np.concatenate([[0], cut]), np.concatenate([cut, [len(rows)]]) - 1
    runs = Runs(segment[first], rows[first], rows[last] + 1)
    keys = np.bincount(runs.segment, runs.stop - forest.start[runs.segment], minlength=forest.num_segments)
    crowded = (keys > 4 * (forest.stop - forest.start))[runs.segment]
    if not crowded.any():
        return runs
    leads = np.concatenate([[True], (runs.segment[1:] != runs.segment[:-1])]) | ~crowded
    lead = np.flatnonzero(leads)
    ends = np.concatenate([lead[1:], [len(runs)]]) - 1
    return Runs(runs.segment[lead], runs.start[lead], runs.stop[ends])


def chunks(
    forest: Forest,
    runs: Runs,
    *,
    computed: Runs | None = None,
    window: int | None,
    levels: int,
    max_rows: int,
    max_keys: int,
) -> list[Chunk]:
    """Cut the runs into chunks of at most ``max_rows`` query rows; a call gathers at most about ``max_keys`` keys.

    ``max_keys`` is exceeded only by a call of a single run, whose keys are no longer than its request. ``computed``:
    what the residual has rows of, all of the forest by default; the runs are among them.
    """
    residual = None if computed is None else computed.rows()
    return [
        _chunk(forest, piece, residual, window=window, levels=0 if window is not None else levels, max_keys=max_keys)
        for piece in _split_rows(runs, max_rows)
    ]


def _split_rows(runs: Runs, max_rows: int) -> Iterator[Runs]:
    """Consecutive groups of near-equal size; a run that crosses a border is split there."""
    total = runs.num_rows
    count = -(-total // max_rows)
    ends = np.cumsum(runs.stop - runs.start)
    borders = np.arange(1, count) * total // count
    cuts = np.unique(np.concatenate([ends, borders]))
    owner = np.searchsorted(ends, cuts, side="left")
    stop = runs.stop[owner] - (ends[owner] - cuts)
    start = stop - np.diff(cuts, prepend=0)
    pieces = Runs(runs.segment[owner], start, stop)
    edges = [0, *(np.searchsorted(cuts, borders) + 1).tolist(), len(cuts)]
    for low, high in itertools.pairwise(edges):
        yield pieces[low:high]


def _chunk(
    forest: Forest, runs: Runs, residual: Int64Array | None, *, window: int | None, levels: int, max_keys: int
) -> Chunk:
    rectangles = [call for level in range(min(levels, forest.max_depth)) for call in _level_calls(forest, runs, level)]
    diagonal = tuple(_diagonal_calls(forest, runs, window=window, levels=levels, max_keys=max_keys))
    rows = runs.rows() if residual is None else np.searchsorted(residual, runs.rows())
    return Chunk(as_slice(rows), runs.num_rows, diagonal, tuple(rectangles))


def _level_calls(forest: Forest, runs: Runs, level: int) -> Iterator[AttentionCall]:
    """Rows below depth ``level`` against their ancestor at that depth: one entry an ancestor, empty entries for the
    gaps.
    """
    ancestor = forest.ancestors_at(level)[runs.segment]
    below = (ancestor >= 0) & (forest.depth[runs.segment] > level)
    if not below.any():
        return
    row_stop = np.cumsum(runs.stop - runs.start)
    row_start = row_stop - (runs.stop - runs.start)
    owner = np.where(below, ancestor, -1)
    low, high = np.flatnonzero(below)[[0, -1]]
    owner, begins, ends = owner[low : high + 1], row_start[low : high + 1], row_stop[low : high + 1]
    lead = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    owner, begins = owner[lead], begins[lead]
    inside = owner >= 0
    key_start = np.where(inside, forest.start[owner], 0)
    key_stop = np.where(inside, forest.stop[owner], 0)
    first_row = int(begins[0])
    yield AttentionCall(
        first_row=first_row,
        cu_q=np.concatenate([begins, ends[-1:]]).astype(np.int32) - np.int32(first_row),
        cu_k=_cumulative(key_stop - key_start),
        keys=as_slice(ranges(key_start, key_stop)),
        causal=False,
        window=None,
        merged=np.ones(len(owner), bool),
    )


def _diagonal_calls(
    forest: Forest, runs: Runs, *, window: int | None, levels: int, max_keys: int
) -> Iterator[AttentionCall]:
    """Every run against its own segment up to its end, with the ancestors from depth ``levels`` on in front."""
    own = runs.stop - forest.start[runs.segment]
    gathered = forest.depth[runs.segment] > levels
    above = np.zeros(len(runs), np.int64)
    if gathered.any():
        base = forest.ancestors_at(levels)[runs.segment[gathered]]
        above[gathered] = forest.first_position[runs.segment[gathered]] - forest.first_position[base]
    if window is not None:  # the run's first row sees window - 1 rows before it
        reach = (window - 1) + (runs.stop - runs.start)
        own, above = np.minimum(own, reach), np.minimum(above, np.maximum(reach - own, 0))
    first_row = 0
    for low, high in _key_groups(own + above, max_keys):
        part = runs[low:high]
        lengths = part.stop - part.start
        yield AttentionCall(
            first_row=first_row,
            cu_q=_cumulative(lengths),
            cu_k=_cumulative(own[low:high] + above[low:high]),
            keys=_path_keys(forest, part, own[low:high], above[low:high]),
            causal=True,
            window=window,
            merged=forest.depth[part.segment] > 0 if levels else np.zeros(len(part), bool),
        )
        first_row += int(lengths.sum())


def _path_keys(forest: Forest, runs: Runs, own: Int64Array, above: Int64Array) -> slice | Int64Array:
    """Packed rows of each run's keys: ``above`` rows of its ancestors, then the last ``own`` rows up to its end."""
    if not above.any():
        return as_slice(ranges(runs.stop - own, runs.stop))
    pieces: list[tuple[Int64Array, Int64Array, Int64Array]] = []  # (key, start, stop): later ancestors sort earlier
    order = np.arange(len(runs)) * (forest.max_depth + 2)
    pieces.append((order + forest.max_depth + 1, runs.stop - own, runs.stop))
    segment, left = runs.segment, above.copy()
    while (left > 0).any():
        segment = np.where(left > 0, forest.parent[segment], segment)
        take = np.minimum(left, forest.stop[segment] - forest.start[segment])
        pieces.append((order + forest.depth[segment], forest.stop[segment] - take, forest.stop[segment]))
        left = left - take
    key, start, stop = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    kept = stop > start
    by_run = np.argsort(key[kept], kind="stable")
    return as_slice(ranges(start[kept][by_run], stop[kept][by_run]))


def _key_groups(keys: Int64Array, max_keys: int) -> Iterator[tuple[int, int]]:
    """Consecutive groups of entries whose keys together stay within ``max_keys``; one entry at least."""
    low, total = 0, 0
    for index, count in enumerate(keys.tolist()):
        if index > low and total + count > max_keys:
            yield low, index
            low, total = index, 0
        total += count
    yield low, len(keys)


def _cumulative(lengths: Int64Array) -> Int32Array:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def as_slice(rows: Int64Array) -> slice | Int64Array:
    """Ascending rows as a slice where they are contiguous."""
    contiguous = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else rows
