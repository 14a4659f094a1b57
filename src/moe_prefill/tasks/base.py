"""What every task is: a pair of pure functions between rows of a table and atomic requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core import AtomicResult, Column, Int32Array, PreparedRow
from ..errors import RowError

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """One prompt of a row for a dry run: the context's ids, int32 [T], and the ids of each candidate after it."""

    context: Int32Array
    candidates: tuple[tuple[str, tuple[int, ...]], ...]


class Task(Protocol):
    """Rows to atomic requests, and results to values for new columns. Holds no state that rows change."""

    @property
    def name(self) -> str:
        """The task's kind: classify, choose, select, rank or score."""
        ...

    @property
    def placeholders(self) -> frozenset[str]:
        """Input columns that the task reads."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns that the task adds, in order; the error column is not among them."""
        ...

    @property
    def answer_column(self) -> str:
        """The column of ``columns`` that is compared with a gold column."""
        ...

    @property
    def digest(self) -> str:
        """Names all of task and tokenizer that may change an answer; a resumed job refuses another one."""
        ...

    def prepare(self, rows: Sequence[Row]) -> list[PreparedRow | RowError]:
        """Turn rows into requests, in order. A row that cannot be asked gives its RowError in its place."""
        ...

    def finish(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> dict[str, object]:
        """Values for ``columns`` from the results of ``prepared.requests``, in the same order."""
        ...

    def notes(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> tuple[str, ...]:
        """What to count about this row beyond ``prepared.notes``, for example "length_normalisation_changed"."""
        ...

    def preview(self, prepared: PreparedRow) -> list[Preview]:
        """The prompts behind ``prepared``, for people to read."""
        ...
