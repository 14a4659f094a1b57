"""What is read at the end of a sweep: the asked rows, and of each the candidates or the vocabulary.

Letters: A rows that the last layer carries, S asked rows (a subset), P (row, id) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..core import AtomicRequest, Int64Array
from .staging import Staged, Staging, Uploaded


@dataclass(frozen=True, slots=True, eq=False)
class HeadPlan:
    """What is read of a group of asked rows. Pairs are sorted by row.

    ``rows`` index the rows that the last layer carried; ``pair_row`` indexes ``rows``. ``unique`` and ``pair_unique``
    are filled for the group that needs no vocabulary, ``bounds`` and ``rows_per_block`` for the one that does.
    """

    rows: torch.Tensor
    pair_row: torch.Tensor
    pair_id: torch.Tensor
    unique: torch.Tensor
    pair_unique: torch.Tensor
    bounds: list[int]
    rows_per_block: int
    top_k: int


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """How one request finds its answers in its group's outputs: host indices of its pairs and of its asked rows."""

    vocabulary: bool
    pairs: Int64Array
    rows: Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class _StagedHead:
    rows: Staged
    pair_row: Staged
    pair_id: Staged
    unique: Staged
    pair_unique: Staged
    bounds: list[int]
    rows_per_block: int
    top_k: int

    def on(self, device: Uploaded) -> HeadPlan:
        return HeadPlan(
            rows=device[self.rows],
            pair_row=device[self.pair_row],
            pair_id=device[self.pair_id],
            unique=device[self.unique],
            pair_unique=device[self.pair_unique],
            bounds=self.bounds,
            rows_per_block=self.rows_per_block,
            top_k=self.top_k,
        )


class HeadStager:
    """Sorts what all requests ask into two groups: with the vocabulary and without. A row asked twice is computed
    once.
    """

    def __init__(
        self, requests: Sequence[AtomicRequest], asked: Int64Array, carried: Int64Array, block_bytes: int, vocab: int
    ) -> None:
        self._requests = requests
        self._carried = carried
        self._vocab = vocab
        self._rows_per_block = max(1, block_bytes // (4 * vocab))
        ends = np.cumsum([len(request.positions) for request in requests])
        self._asked = np.split(asked, ends[:-1])
        self._reads: dict[int, ReadPlan] = {}
        self._rows_read = 0

    def stage(self, staging: Staging, *, vocabulary: bool) -> _StagedHead | None:
        members = [i for i, request in enumerate(self._requests) if request.vocabulary == vocabulary]
        if not members:
            return None
        rows = np.unique(np.concatenate([self._asked[i] for i in members]))
        row_of = {i: np.searchsorted(rows, self._asked[i]) for i in members}
        pair_row = np.concatenate([np.repeat(row_of[i], np.diff(self._requests[i].id_offsets)) for i in members])
        pair_id = np.concatenate([self._requests[i].ids for i in members]).astype(np.int64)
        order = np.argsort(pair_row, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self._remember(members, row_of, place, vocabulary)
        pair_row, pair_id = pair_row[order].astype(np.int64), pair_id[order]
        unique, pair_unique = np.unique(pair_id, return_inverse=True)
        self._rows_read += len(rows) * self._vocab if vocabulary else len(np.unique(pair_row * self._vocab + pair_id))
        edges = np.arange(0, len(rows) + self._rows_per_block, self._rows_per_block)
        return _StagedHead(
            rows=staging.add(np.searchsorted(self._carried, rows).astype(np.int64)),
            pair_row=staging.add(pair_row),
            pair_id=staging.add(pair_id),
            unique=staging.add(unique.astype(np.int64)),
            pair_unique=staging.add(pair_unique.astype(np.int64)),
            bounds=np.searchsorted(pair_row, edges).tolist(),
            rows_per_block=self._rows_per_block,
            top_k=max(self._requests[i].top_k for i in members),
        )

    def _remember(self, members: list[int], row_of: dict[int, Int64Array], place: Int64Array, vocabulary: bool) -> None:
        done = 0
        for index in members:
            count = len(self._requests[index].ids)
            self._reads[index] = ReadPlan(vocabulary, place[done : done + count], row_of[index])
            done += count

    def reads(self) -> tuple[ReadPlan, ...]:
        return tuple(self._reads[index] for index in range(len(self._requests)))

    def rows_read(self) -> int:
        """LM head rows that were asked, over all asked positions."""
        return self._rows_read
