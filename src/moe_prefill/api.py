"""The Python interface: an engine that labels, chooses, selects, ranks and scores texts in memory.

Rows are plain texts, or mappings from column names to values for prompts with several placeholders. A row that cannot
be answered carries its error in its result and leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .core import AtomicResult, PreparedRow, RunStats, ScoringEngine
from .errors import RowError
from .tasks import Task, TaskConfig, build_task, config_from_mapping

if TYPE_CHECKING:
    from .text import Tokenizer

Rows = Iterable[str | Mapping[str, object]]


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


class Engine:
    """A model ready to score, on one device or, with ``gpus=N``, in N worker processes.

    ``model`` is a directory or a hub id; ``settings`` are the fields of ``EngineConfig`` (device, dtype, sharing,
    ...). Usable as a context manager. Raises UsageError, ModelError and PlanError with the numbers.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        from .checkpoint import resolve_directory
        from .text import Tokenizer
        from .workers import build_scoring

        self.config = EngineConfig(model=str(model), **settings)
        directory = resolve_directory(self.config.model, revision=self.config.revision, weights=False)
        self.tokenizer: Tokenizer = Tokenizer.from_directory(directory)
        self.scoring: ScoringEngine = build_scoring(self.config)

    def classify(self, rows: Rows, *, labels: Sequence[Any], **options: Any) -> list[Classification]:
        """One of ``labels`` for each row. Options are the fields of ``tasks.ClassifyConfig``."""
        return [
            Classification(
                label=values.get("predicted_label"),
                probability=values.get("probability"),
                probabilities=values.get("probabilities"),
                error=values.get("error"),
            )
            for values in self._answers("classify", rows, {"labels": labels, **options})
        ]

    def choose(self, rows: Rows, **options: Any) -> list[Choice]:
        """One of a row's options, named by letters in the prompt. Options are the fields of ``tasks.ChooseConfig``."""
        return [
            Choice(
                identifier=values.get("choice"),
                index=values.get("choice_index"),
                text=values.get("choice_text"),
                probability=values.get("probability"),
                probabilities=values.get("probabilities"),
                error=values.get("error"),
            )
            for values in self._answers("choose", rows, options)
        ]

    def select(self, rows: Rows, **options: Any) -> list[Selection]:
        """All candidates that apply. Options are the fields of ``tasks.SelectConfig``."""
        return [
            Selection(
                selected=values.get("selected"), probabilities=values.get("probabilities"), error=values.get("error")
            )
            for values in self._answers("select", rows, options)
        ]

    def rank(self, rows: Rows, **options: Any) -> list[Ranking]:
        """Candidates from best to worst. Options are the fields of ``tasks.RankConfig``."""
        return [
            Ranking(
                candidates=values.get("ranking"),
                scores=values.get("ranking_scores"),
                indices=values.get("ranking_indices"),
                error=values.get("error"),
            )
            for values in self._answers("rank", rows, options)
        ]

    def score(self, rows: Rows, **options: Any) -> list[Scoring]:
        """Log-probabilities of continuations, documents or given ids. Options are the fields of
        ``tasks.ScoreConfig``.
        """
        return [
            Scoring(
                logprob=values.get("logprob"),
                num_tokens=values.get("num_tokens"),
                tokens=values.get("tokens"),
                token_logprobs=values.get("token_logprobs"),
                is_greedy=values.get("is_greedy"),
                top_logprobs=values.get("top_logprobs"),
                candidate_logprobs=values.get("candidate_logprobs"),
                error=values.get("error"),
            )
            for values in self._answers("score", rows, options)
        ]

    @property
    def stats(self) -> RunStats:
        """Work done so far: tokens, tokens saved by sharing, FLOPs, seconds."""
        return self.scoring.stats

    def close(self) -> None:
        """Free the model's memory."""
        self.scoring.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self, kind: str, rows: Rows, options: Mapping[str, Any]) -> list[dict[str, Any]]:
        config = config_from_mapping(kind, options)
        table = [row if isinstance(row, Mapping) else {config.text_column: row} for row in rows]
        if not table:
            return []
        task = build_task(config, self.tokenizer, self.scoring.limits, sorted(set(chain.from_iterable(table))))
        absent = dict.fromkeys(task.placeholders)
        return list(answer_rows(task, self.scoring, [{**absent, **row} for row in table], config))


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
            yield {"error": f"{code}: {error}"}
            continue
        assert isinstance(row, PreparedRow)
        values = task.finish(row, [result for result in mine if isinstance(result, AtomicResult)])
        yield {name.removeprefix(config.output_prefix): value for name, value in values.items()}


def _requests(row: PreparedRow | RowError) -> tuple[Any, ...]:
    return () if isinstance(row, RowError) else row.requests
