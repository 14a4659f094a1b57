"""The Python interface: an engine that labels, chooses, selects, ranks and scores texts in memory.

Rows are plain texts, or mappings from column names to values for prompts with several placeholders. A row that cannot
be answered carries its error in its result and leaves the others alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from .config import EngineConfig
from .core import AtomicResult, PreparedRow, RunStats, ScoringEngine
from .errors import MoePrefillError, RowError, UsageError, did_you_mean
from .tasks import Task, TaskConfig, build_task, config_from_mapping
from .tasks.taskfile import CONFIGS

if TYPE_CHECKING:
    from .text import Tokenizer

Rows = Iterable[str | Mapping[str, object]]
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])")
_CONFIGS: tuple[type[Any], ...] = (EngineConfig, *CONFIGS.values())
_FIELDS = {field.name for config in _CONFIGS for field in fields(config)}
_OTHER_NAMES = {"hbm-gib": "memory_gib", "prefix": "output_prefix"}  # flags that are not called as their fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """``label`` is the most probable one; ``probabilities`` has every label. All None with an ``error``."""

    label: str | None
    probability: float | None
    probabilities: Mapping[str, float] | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """``identifier`` is the letter in the prompt, ``index`` and ``text`` the option behind it."""

    identifier: str | None
    index: int | None
    text: str | None
    probability: float | None
    probabilities: Mapping[str, float] | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The candidates at or above the threshold, in the order given, and every candidate's probability."""

    selected: Sequence[str] | None
    probabilities: Mapping[str, float] | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Candidates from best to worst, their scores, and their places in the list that was given."""

    candidates: Sequence[str] | None
    scores: Sequence[float] | None
    indices: Sequence[int] | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Log-probability (natural logarithm) of a continuation: the sum, and token by token.

    ``tokens`` is None for prompts given as ids. ``candidate_logprobs`` [positions][ids] and ``top_logprobs`` are
    filled when asked.
    """

    logprob: float | None
    num_tokens: int | None
    tokens: Sequence[str] | None
    token_logprobs: Sequence[float] | None
    is_greedy: bool | None = None
    top_logprobs: Any = None
    candidate_logprobs: Any = None
    error: str | None = None


Result = TypeVar("Result", Classification, Choice, Selection, Ranking, Scoring)


class Engine:
    """A model ready to score, on one device or, with ``gpus=N``, in N worker processes.

    ``model`` is a directory or a hub id; ``settings`` are the fields of ``EngineConfig`` (device, dtype, sharing,
    ...). Usable as a context manager. Raises UsageError, ModelError and PlanError with the numbers.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        from .checkpoint import resolve_directory
        from .text import Tokenizer
        from .workers import build_scoring

        known = [field.name for field in fields(EngineConfig)]
        unknown = [f"{name}{did_you_mean(name, known)}" for name in settings if name not in known]
        if unknown:
            raise UsageError(f"there is no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        self._lock = Lock()  # one call at a time, from whatever thread
        self._closed = False
        with _fields_named():
            self.config = EngineConfig(model=str(model) if isinstance(model, Path) else model, **settings)
            directory = resolve_directory(self.config.model, revision=self.config.revision, weights=False)
            self.tokenizer: Tokenizer = Tokenizer.from_directory(directory)
            self.scoring: ScoringEngine = build_scoring(self.config)

    def classify(self, rows: Rows, *, labels: Sequence[Any], **options: Any) -> list[Classification]:
        """One of ``labels`` for each row. Options are the fields of ``tasks.ClassifyConfig``."""
        given = {"labels": labels, **options}
        return self._results(Classification, "classify", rows, given, label="predicted_label")

    def choose(self, rows: Rows, **options: Any) -> list[Choice]:
        """One of a row's options, named by letters in the prompt. Options are the fields of ``tasks.ChooseConfig``."""
        columns = {"identifier": "choice", "index": "choice_index", "text": "choice_text"}
        return self._results(Choice, "choose", rows, options, **columns)

    def select(self, rows: Rows, **options: Any) -> list[Selection]:
        """All candidates that apply. Options are the fields of ``tasks.SelectConfig``."""
        return self._results(Selection, "select", rows, options)

    def rank(self, rows: Rows, **options: Any) -> list[Ranking]:
        """Candidates from best to worst. Options are the fields of ``tasks.RankConfig``."""
        columns = {"candidates": "ranking", "scores": "ranking_scores", "indices": "ranking_indices"}
        return self._results(Ranking, "rank", rows, options, **columns)

    def score(self, rows: Rows, **options: Any) -> list[Scoring]:
        """Log-probabilities of continuations, documents or given ids. Options are the fields of
        ``tasks.ScoreConfig``.
        """
        return self._results(Scoring, "score", rows, options)

    @property
    def stats(self) -> RunStats:
        """Work done so far: tokens, tokens saved by sharing, FLOPs, seconds."""
        return self.scoring.stats

    def close(self) -> None:
        """Free the model's memory. A closed engine may be closed again, and does nothing else."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.scoring.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _results(
        self, made: type[Result], kind: str, rows: Rows, options: Mapping[str, Any], **columns: str
    ) -> list[Result]:
        """A record for each row, whose fields are the task's columns of the same name, or those of ``columns``."""
        names = {field.name: columns.get(field.name, field.name) for field in fields(made)}
        return [
            made(**{name: values.get(column) for name, column in names.items()})
            for values in self._answers(kind, rows, options)
        ]

    def _answers(self, kind: str, rows: Rows, options: Mapping[str, Any]) -> list[dict[str, Any]]:
        with _fields_named(), self._lock:
            if self._closed:
                raise UsageError("the engine is closed; make another one")
            _check_rows(rows)
            config = config_from_mapping(kind, options)
            table = [row if isinstance(row, Mapping) else {config.text_column: row} for row in rows]
            if not table:
                return []
            columns = _column_names(table)
            task = build_task(config, self.tokenizer, self.scoring.limits, columns)
            absent = dict.fromkeys(task.placeholders)
            return list(answer_rows(task, self.scoring, [{**absent, **row} for row in table], config))


def _check_rows(rows: object) -> None:
    """Raise UsageError for what would be taken apart into other things than rows."""
    if isinstance(rows, str | bytes | Mapping):
        raise UsageError(f"rows is one {type(rows).__name__}; give a list of rows, also for a single one")
    if hasattr(rows, "columns"):  # of a data frame one would get the columns' names or values
        ways = [f"rows.{name}" for name in ("to_dicts()", "to_pylist()") if hasattr(rows, name[:-2])]
        way = ways[0] if ways else "rows.to_dict('records')"
        raise UsageError(f"rows is a {type(rows).__name__}; give its rows as mappings ({way}), or one column of texts")
    if not isinstance(rows, Iterable):
        raise UsageError(f"rows is {rows!r}; give a list of texts or mappings")


def _column_names(table: Sequence[Mapping[str, object]]) -> list[str]:
    names = set(chain.from_iterable(table))
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None:
        raise UsageError(f"a row has the column {odd!r} of type {type(odd).__name__}; names of columns are texts")
    return sorted(names)


@contextmanager
def _fields_named() -> Iterator[None]:
    """Errors name settings as Python does, not as the command line."""
    try:
        yield
    except MoePrefillError as error:
        error.args = (fields_named(str(error)), *error.args[1:])
        raise


def fields_named(message: str) -> str:
    """A message whose flags (``--top-n``) are named as the fields that they set (``top_n``)."""

    def field_of(flag: re.Match[str]) -> str:
        name = _OTHER_NAMES.get(flag[1], flag[1].replace("-", "_"))
        return name if name in _FIELDS else flag[0]

    return _FLAG.sub(field_of, message)


def answer_rows(
    task: Task, engine: ScoringEngine, rows: Sequence[Mapping[str, object]], config: TaskConfig
) -> Iterable[dict[str, Any]]:
    """Values of the task's columns for each row, or its error, in order; one call to the engine."""
    prepared = task.prepare(rows)
    results = iter(engine.score([request for row in prepared for request in _requests(row)]))
    for row in prepared:
        mine = list(islice(results, len(_requests(row))))
        error = row if isinstance(row, RowError) else next((r for r in mine if isinstance(r, Exception)), None)
        if error is not None:
            code = error.code if isinstance(error, RowError) else type(error).__name__
            yield {"error": f"{code}: {fields_named(str(error))}"}
            continue
        assert isinstance(row, PreparedRow)
        values = task.finish(row, [result for result in mine if isinstance(result, AtomicResult)])
        yield {name.removeprefix(config.output_prefix): value for name, value in values.items()}


def _requests(row: PreparedRow | RowError) -> tuple[Any, ...]:
    return () if isinstance(row, RowError) else row.requests
