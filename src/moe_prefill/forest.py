"""The prefix forest: a batch's token sequences as runs of tokens that are computed once.

Requests are sorted, neighbours' common prefixes give a trie, and a rule says which branch points are worth a segment
of their own. A branch point that is not kept is pushed down: its run is copied into each child. Segments are packed
in depth-first order, so the descendants of a segment are the contiguous rows right behind it. Numpy only; Python work
is per request, never per token.

Letters: R requests, S segments, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .core import Int32Array, Int64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingRule:
    """When a branch point becomes a segment of its own. All costs in units of one token's linear work in one layer.

    Sharing a run of n tokens among c children saves ``(c - 1) n`` tokens. It costs every token below one more
    rectangular attention row and one merge (``merge_cost``), as long as the segment is among the first ``levels`` of
    its path; deeper ones are gathered instead: their keys are copied into each segment below (``gather_cost`` a key).
    """

    min_saved: float = 0.0
    merge_cost: float = 0.0
    gather_cost: float = 0.0
    levels: int = 4
    share: bool = True

    def pays(self, *, run: int, children: int, depth: int, tokens_below: int, segments_below: int) -> bool:
        if not self.share or children < 2:
            return False
        saved = (children - 1) * run
        if depth < self.levels:
            return saved > self.min_saved + self.merge_cost * tokens_below
        return saved > self.min_saved + self.gather_cost * run * segments_below


SHARE_NOTHING = SharingRule(share=False)
SHARE_EVERYTHING = SharingRule(min_saved=0.5)


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """Packed segments. ``tokens``, ``positions`` int32 [T]; the other arrays have one entry a segment or a request.

    ``start``, ``stop``: rows of the segment; ``subtree_stop``: end of the rows of its descendants.
    ``first_position``: position of its first token. ``parent`` is -1 for a root, ``depth`` 0. ``tip`` [R]: the
    segment that holds the request's last token. ``request_of`` [S]: one request that runs through the segment.
    """

    tokens: Int32Array
    positions: Int32Array
    start: Int64Array
    stop: Int64Array
    subtree_stop: Int64Array
    first_position: Int64Array
    parent: Int64Array
    depth: Int64Array
    tip: Int64Array
    request_of: Int64Array
    prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_segments(self) -> int:
        return len(self.start)

    @property
    def max_depth(self) -> int:
        return int(self.depth.max(initial=0))

    def rows_of(self, requests: Int64Array, positions: Int64Array) -> Int64Array:
        """Packed rows of (request, position) pairs, int64 of the same shape."""
        segment = self.tip[requests]
        while True:
            above = self.first_position[segment] > positions
            if not above.any():
                return self.start[segment] + positions - self.first_position[segment]
            segment = np.where(above, self.parent[segment], segment)

    def needed_rows(self, lengths: Int64Array, held: Int64Array) -> Int64Array:
        """Packed rows that somebody has to compute, ascending: of a request of ``lengths[r]`` tokens the positions
        from ``held[r]`` on. The others lie in the pool.
        """
        change = np.zeros(self.num_tokens + 1, np.int64)
        segment = self.tip
        while len(segment):
            first = self.first_position[segment]
            begin, shift = np.maximum(held, first), self.start[segment] - first
            end = np.minimum(lengths, first + self.stop[segment] - self.start[segment])
            some = begin < end
            np.add.at(change, (begin + shift)[some], 1)
            np.add.at(change, (end + shift)[some], -1)
            higher = held < first
            segment, held, lengths = self.parent[segment[higher]], held[higher], lengths[higher]
        return np.flatnonzero(np.cumsum(change[:-1])).astype(np.int64)

    def segment_of_rows(self, rows: Int64Array) -> Int64Array:
        """The segment of each packed row."""
        return np.searchsorted(self.stop, rows, side="right").astype(np.int64)

    def ancestors_at(self, level: int) -> Int64Array:
        """For each segment its ancestor at depth ``level``: itself when that is its own depth, -1 when it is
        shallower.
        """
        candidates = np.flatnonzero(self.depth == level)
        nearest = np.searchsorted(self.start[candidates], self.start, side="right") - 1
        found = candidates[np.maximum(nearest, 0)] if len(candidates) else np.full(self.num_segments, -1)
        inside = (nearest >= 0) & (self.start < self.subtree_stop[found])
        return np.where(inside, found, -1).astype(np.int64)


def sort_requests(sequences: Sequence[Int32Array], salts: Sequence[str] | None = None) -> list[int]:
    """Indices that put the sequences in lexicographic order of (salt, tokens); equal ones stay in order of arrival."""
    # Big-endian unsigned words compare as bytes the way the numbers do.
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]
    if salts is None:
        return sorted(range(len(keys)), key=keys.__getitem__)
    return sorted(range(len(keys)), key=lambda index: (salts[index], keys[index]))


def common_prefixes(
    sequences: Sequence[Int32Array], order: Sequence[int], salts: Sequence[str] | None = None
) -> list[int]:
    """Length of the prefix that each sorted sequence shares with the one before it (0 for the first, and between
    salts).
    """
    shared = [0] * len(order)
    for index in range(1, len(order)):
        left, right = order[index - 1], order[index]
        if salts is None or salts[left] == salts[right]:
            shared[index] = _common_prefix(sequences[left], sequences[right])
    return shared


def _common_prefix(a: Int32Array, b: Int32Array) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


@dataclass(slots=True, eq=False)
class _Node:
    """A branch point of the sorted requests ``lo..hi``: they agree on their first ``end`` tokens."""

    end: int
    lo: int
    hi: int
    children: list[_Node]
    tokens_below: int = 0  # distinct tokens under the branch point when everything is shared
    segments_below: int = 0


def _trie(lengths: list[int], shared: list[int]) -> _Node:
    """Interval tree of the common prefixes; its leaves are the requests, in sorted order."""
    root = _Node(0, 0, len(lengths), [])
    path = [root]
    for index, length in enumerate(lengths):
        depth = shared[index]
        last: _Node | None = None
        while path[-1].end > depth:
            last = path.pop()
            last.hi = index
            _close(last)
            if path[-1].end <= depth:
                break
            path[-1].children.append(last)
            last = None
        if last is not None:
            if path[-1].end < depth:  # a branch point between two known ones
                path.append(_Node(depth, last.lo, 0, [last]))
            else:
                path[-1].children.append(last)
        if length > path[-1].end:
            path.append(_Node(length, index, 0, []))
    while len(path) > 1:
        node = path.pop()
        node.hi = len(lengths)
        _close(node)
        path[-1].children.append(node)
    _close(root)
    return root


def _close(node: _Node) -> None:
    node.tokens_below = sum(child.end - node.end + child.tokens_below for child in node.children)
    node.segments_below = sum(1 + child.segments_below for child in node.children)


def build_forest(sequences: Sequence[Int32Array], rule: SharingRule, salts: Sequence[str] | None = None) -> Forest:
    """Merge token sequences (int32, none empty) into packed segments; O(R log R) Python work, O(T) numpy work."""
    assert sequences, "a forest needs at least one sequence"
    order, packer = _packed(sequences, rule, salts)
    return packer.finish(sequences, order)


def shared_tokens(sequences: Sequence[Int32Array], rule: SharingRule, salts: Sequence[str] | None = None) -> int:
    """How many tokens the forest of these sequences has, without packing it."""
    if not rule.share:
        return sum(map(len, sequences))
    return _packed(sequences, rule, salts)[1].rows


def own_tokens(lengths: Sequence[int], shared: Sequence[int], rule: SharingRule) -> Int64Array:
    """How many tokens each of sorted requests adds to their forest, [R]: the others are computed for another one.
    ``shared``: length of the prefix that each has in common with the one before it.
    """
    if not rule.share:
        return np.asarray(lengths, np.int64)
    packer = _Packer(rule, list(lengths))
    packer.walk(_trie(list(lengths), list(shared)))
    added = np.zeros(len(lengths), np.int64)
    np.add.at(added, packer.source, np.asarray(packer.end) - np.asarray(packer.begin))
    return added


def _packed(
    sequences: Sequence[Int32Array], rule: SharingRule, salts: Sequence[str] | None
) -> tuple[list[int], _Packer]:
    order = sort_requests(sequences, salts) if rule.share else list(range(len(sequences)))
    shared = common_prefixes(sequences, order, salts) if rule.share else [0] * len(order)
    lengths = [len(sequences[index]) for index in order]
    packer = _Packer(rule, lengths)
    packer.walk(_trie(lengths, shared))
    return order, packer


class _Packer:
    """Walks the trie once, deciding what to keep, and lays the kept segments out depth first."""

    def __init__(self, rule: SharingRule, lengths: list[int]) -> None:
        self.rule = rule
        self.lengths = lengths
        self.rows = 0
        self.tip = [-1] * len(lengths)  # by sorted index
        self.begin: list[int] = []  # position of the segment's first token
        self.end: list[int] = []
        self.start: list[int] = []
        self.subtree_stop: list[int] = []
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.source: list[int] = []  # sorted index of a request that runs through the segment

    def walk(self, root: _Node) -> None:
        # Iterative: a forced trie can be deeper than Python's stack. A negative entry closes a segment's subtree.
        todo: list[tuple[_Node | None, int, int]] = [(child, 0, -1) for child in reversed(root.children)]
        while todo:
            node, begin, parent = todo.pop()
            if node is None:
                self.subtree_stop[parent] = self.rows
                continue
            if node.children and not self._keep(node, begin, parent):
                todo.extend((child, begin, parent) for child in reversed(node.children))
                continue
            segment = self._add(node, begin, parent)
            todo.append((None, 0, segment))
            todo.extend((child, node.end, segment) for child in reversed(node.children))

    def _keep(self, node: _Node, begin: int, parent: int) -> bool:
        return self.rule.pays(
            run=node.end - begin,
            children=len(node.children),
            depth=0 if parent < 0 else self.depth[parent] + 1,
            tokens_below=node.tokens_below,
            segments_below=node.segments_below,
        )

    def _add(self, node: _Node, begin: int, parent: int) -> int:
        segment = len(self.start)
        self.begin.append(begin)
        self.end.append(node.end)
        self.start.append(self.rows)
        self.subtree_stop.append(0)
        self.parent.append(parent)
        self.depth.append(0 if parent < 0 else self.depth[parent] + 1)
        self.source.append(node.lo)
        self.rows += node.end - begin
        for index in range(node.lo, node.hi if not node.children else node.lo + 1):
            self.tip[index] = segment
        return segment

    def finish(self, sequences: Sequence[Int32Array], order: list[int]) -> Forest:
        self._place_prefixes()
        pieces = [sequences[order[s]][b:e] for s, b, e in zip(self.source, self.begin, self.end, strict=True)]
        start = np.asarray(self.start, np.int64)
        begin = np.asarray(self.begin, np.int64)
        stop = start + np.asarray(self.end, np.int64) - begin
        positions = np.arange(self.rows, dtype=np.int64) + np.repeat(begin - start, stop - start)
        tip = np.empty(len(order), np.int64)
        tip[order] = self.tip
        return Forest(
            tokens=np.concatenate(pieces),
            positions=positions.astype(np.int32),
            start=start,
            stop=stop,
            subtree_stop=np.asarray(self.subtree_stop, np.int64),
            first_position=begin,
            parent=np.asarray(self.parent, np.int64),
            depth=np.asarray(self.depth, np.int64),
            tip=tip,
            request_of=np.asarray(order, np.int64)[self.source],
            prompt_tokens=sum(self.lengths),
        )

    def _place_prefixes(self) -> None:
        """A request that is a prefix of its successor ends inside the successor's path: find the segment by walking
        up.
        """
        for index in range(len(self.tip) - 1, -1, -1):
            if self.tip[index] < 0 or self.end[self.tip[index]] < self.lengths[index]:
                self.tip[index] = self.tip[index + 1]
            segment = self.tip[index]
            while self.begin[segment] >= self.lengths[index]:
                segment = self.parent[segment]
            self.tip[index] = segment
