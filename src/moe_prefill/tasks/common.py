"""What the label tasks share: prompter, columns, and the parts of the Task protocol that follow from them."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from ..core import AtomicResult, Column, EngineLimits, PreparedRow
from ..errors import RowError, UsageError
from ..text import Tokenizer
from .base import Preview, Row
from .config import TaskConfig
from .labels import Float64Array
from .prompts import Ask, Asked, Prompter
from .template import Template, check_columns, columns_of, fields_of


class LabelTask(ABC):
    """Base of the tasks that compare labels after prompts. A subclass says what a row asks and reads the scores."""

    name = ""
    reserved: frozenset[str] = frozenset()  # placeholders that the task fills itself
    outputs: tuple[Column, ...] = ()

    def __init__(
        self,
        config: TaskConfig,
        source: str,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        *,
        label_end: str | None = None,
        vocabulary: bool = False,
        list_columns: Collection[str] = (),
    ) -> None:
        template = Template.parse(source)
        self._prompter = Prompter(config, template, tokenizer, limits, label_end=label_end, vocabulary=vocabulary)
        self._text_columns = columns_of([template], self.reserved)
        self.placeholders = self._text_columns | frozenset(list_columns)
        self.columns = prefixed(self.outputs, config.output_prefix)
        self.answer_column = self.columns[0].name
        self.digest = digest_of(self.name, config, source, tokenizer, self._prompter, limits)

    def check_table(self, columns: Sequence[str] | None) -> None:
        """Raise TaskError for columns that are missing, and UsageError for output columns that are there already."""
        check_columns(self.placeholders, columns, self.reserved)
        check_outputs(self.columns, columns)

    def prepare(self, rows: Sequence[Row]) -> list[PreparedRow | RowError]:
        asks = [self._ask_or_error(row) for row in rows]
        return [self._prepared(ask, asked) for ask, asked in zip(asks, self._prompter.ask(asks), strict=True)]

    def notes(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> tuple[str, ...]:
        return ()

    def preview(self, prepared: PreparedRow) -> list[Preview]:
        ask, asked = _state(prepared)
        return [Preview(split.context, tuple(zip(ask.names, split.labels, strict=True))) for split in asked.splits]

    @abstractmethod
    def _ask(self, row: Row) -> Ask:
        """What a row asks. Raises RowError."""

    def _ask_or_error(self, row: Row) -> Ask | RowError:
        try:
            return self._ask(row)
        except RowError as error:
            return error.kept()

    def _fields(self, row: Row) -> dict[str, str]:
        return fields_of(row, self._text_columns)

    def _neutral_fields(self) -> dict[str, str]:
        """Fields for checking the task before any row is seen."""
        return dict.fromkeys(self._text_columns, "x")

    def _prepared(self, ask: Ask | RowError, asked: Asked | RowError) -> PreparedRow | RowError:
        if isinstance(asked, RowError):
            return asked
        return PreparedRow(asked.all_requests, (ask, asked), asked.notes)

    def _named(self, values: Sequence[object]) -> dict[str, object]:
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}


def label_scores(prepared: PreparedRow, results: Sequence[AtomicResult]) -> list[Float64Array]:
    """The labels' log scores of each prompt of a row: float64 [N] each."""
    _, asked = _state(prepared)
    assert len(results) == len(prepared.requests), (len(results), len(prepared.requests))
    scores, start = [], 0
    for plan, requests in zip(asked.plans, asked.requests, strict=True):
        scores.append(plan.scores(requests, results[start : start + len(requests)]))
        start += len(requests)
    return scores


def label_lengths(prepared: PreparedRow) -> Float64Array:
    """Tokens of each label in a row's first prompt, float64 [N]."""
    return _state(prepared)[1].plans[0].lengths.astype("float64")


def asked_of(prepared: PreparedRow) -> Ask:
    """What a row asked."""
    return _state(prepared)[0]


def prefixed(columns: Sequence[Column], prefix: str) -> tuple[Column, ...]:
    """The columns with ``prefix`` before their names."""
    return tuple(Column(name=prefix + column.name, kind=column.kind) for column in columns)


def check_outputs(outputs: Sequence[Column], columns: Sequence[str] | None) -> None:
    """Raise UsageError for output columns that the table has already."""
    clash = [column.name for column in outputs if columns is not None and column.name in columns]
    if clash:
        raise UsageError(
            f"the table has the output column {', '.join(map(repr, clash))} already; "
            "give the added columns a prefix, for example --prefix new_"
        )


def digest_of(
    name: str, config: TaskConfig, source: str, tokenizer: Tokenizer, prompter: Prompter | None, limits: EngineLimits
) -> str:
    """Digest of all that may change an answer; the day only where the chat template reads it."""
    stated = {key: value for key, value in dataclasses.asdict(config).items() if key != "chat_date"}
    parts: list[object] = [name, sorted(stated.items()), source, tokenizer.fingerprint]
    if prompter is not None and prompter.chat is not None and prompter.chat.reads_date:
        parts.append(prompter.chat.today.date().isoformat())
    if config.truncate != "error":
        parts.append(limits.max_request_tokens)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _state(prepared: PreparedRow) -> tuple[Ask, Asked]:
    state = prepared.state
    assert isinstance(state, tuple), type(state)
    return state
