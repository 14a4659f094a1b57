"""From a window's rows to requests, and from results to the values of the added columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from ..core import AtomicRequest, AtomicResult, Column, EngineLimits, PreparedRow
from ..errors import RowError
from .compare import compared_pair
from .counts import Counts
from .tables import Batch, Row
from .windows import Window

if TYPE_CHECKING:
    from ..tasks import Task

_FIRST_ROWS, _MOST_ROWS = 16, 256  # rows prepared at a time, of a window's first chunk and at most
# Prompt tokens of one call to the engine, in sweeps before sharing: bounds memory when rows have many candidates.
_GROUP_SWEEPS = 64

Prepared = PreparedRow | RowError


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a window that are scored in one call: almost always the whole window. ``last``: the window ends here."""

    window: Window
    batch: Batch
    prepared: list[Prepared]
    last: bool

    def requests(self) -> list[AtomicRequest]:
        return list(chain.from_iterable(row.requests for row in self.prepared if isinstance(row, PreparedRow)))


def added_columns(task: Task, prefix: str) -> tuple[Column, ...]:
    """The task's columns, and last the one that every job adds: null, or what went wrong with the row."""
    return *task.columns, Column(name=f"{prefix}error", kind="string")


def groups_of(window: Window, batch: Batch, task: Task, limits: EngineLimits) -> Iterator[Group]:
    """Prepare a window, cut where its requests exceed the group size: a function of rows, task and limits only."""
    budget = limits.max_sweep_tokens * _GROUP_SWEEPS
    held: list[Prepared] = []
    start = tokens = 0
    num_rows = _FIRST_ROWS
    while start < len(batch.rows):
        if tokens >= budget:
            yield Group(window, batch, held, last=False)
            held, tokens = [], 0
        chunk = _prepare(task, batch, start, min(start + num_rows, len(batch.rows)))
        chunk_tokens = sum(len(r.tokens) for row in chunk if isinstance(row, PreparedRow) for r in row.requests)
        held += chunk
        start += len(chunk)
        tokens += chunk_tokens
        num_rows = min(2 * num_rows, _MOST_ROWS, max(1, budget * len(chunk) // max(1, chunk_tokens)))
    yield Group(window, batch, held, last=True)


def _prepare(task: Task, batch: Batch, start: int, end: int) -> list[Prepared]:
    """Prepare rows ``start`` to ``end``; a row that could not be read keeps its error and is not asked."""
    readable = [i for i in range(start, end) if i not in batch.errors]
    absent = dict.fromkeys(task.placeholders)
    prepared = task.prepare([{**absent, **batch.rows[i]} for i in readable])
    assert len(prepared) == len(readable), (len(prepared), len(readable))
    by_index: dict[int, Prepared] = dict(zip(readable, prepared, strict=True))
    return [by_index[i] if i in by_index else batch.errors[i] for i in range(start, end)]


class Answers:
    """The added values of one window's rows as its groups are answered, and what is counted about them."""

    def __init__(self, task: Task, error_name: str, label_column: str | None) -> None:
        self._task = task
        self._error_name = error_name
        self._label_column = label_column
        self.rows: list[Row] = []
        self.counts = Counts()

    def add(self, group: Group, results: Sequence[AtomicResult | Exception]) -> None:
        """Finish the rows of one group with the results of its requests."""
        taken = 0
        for prepared in group.prepared:
            used = len(prepared.requests) if isinstance(prepared, PreparedRow) else 0
            row = self._answer(prepared, results[taken : taken + used])
            taken += used
            if self._label_column is not None:
                self._compare(group.batch.rows[len(self.rows)].get(self._label_column), row)
            self.rows.append(row)
        self.counts.rows = len(self.rows)
        assert taken == len(results), (taken, len(results))

    def _answer(self, prepared: Prepared, results: Sequence[AtomicResult | Exception]) -> Row:
        try:
            if isinstance(prepared, RowError):
                raise prepared
            good = _all_good(results)
            row: Row = self._task.finish(prepared, good)
            self._check_finite(row)
            self.counts.notes.update(prepared.notes)
            self.counts.notes.update(self._task.notes(prepared, good))
        except RowError as error:
            self.counts.errors[error.code] += 1
            return {self._error_name: f"{error.code}: {error}"}
        return row

    def _check_finite(self, row: Row) -> None:
        for name, value in row.items():
            if not _is_finite(value):
                raise RowError(
                    "not_finite",
                    f"the model gave a value for {name!r} that is not a finite number; try --dtype float32, or "
                    "--check-finite to find the cause",
                )

    def _compare(self, gold: object, row: Row) -> None:
        if gold is None or gold == "":
            self.counts.notes["no_gold_label"] += 1
            return
        pair: tuple[str, str | None] = compared_pair(self._task.name, gold, row.get(self._task.answer_column))
        if self._error_name in row:
            pair = (pair[0], None)
        self.counts.pairs[pair] += 1


def _all_good(results: Sequence[AtomicResult | Exception]) -> list[AtomicResult]:
    good: list[AtomicResult] = []
    for result in results:
        if isinstance(result, RowError):
            raise result
        if isinstance(result, Exception):
            raise RowError("engine_error", f"{type(result).__name__}: {result}") from result
        good.append(result)
    return good


def _is_finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))
