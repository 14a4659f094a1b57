"""Run a task over a table: windows in order, each read, prepared, scored, finished and kept."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, TYPE_CHECKING, Protocol

from ..core import Column, EngineLimits, ScoringEngine
from ..errors import InputError, UsageError
from .ahead import one_ahead
from .answers import Answers, Group, error_column, groups_of
from .compare import check_comparable, metrics_of
from .counts import Counts
from .manifest import job_identity
from .output import Output
from .summary import Summary, since, snapshot
from .tables import Batch, Format, Row, Table, TableWriter, open_writer
from .windows import Shard, Window, WindowSize, cut_windows

if TYPE_CHECKING:
    from ..tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """How to run a job. ``window_rows`` None: chosen from the engine's plan. ``prefix`` goes before the error
    column's name; the task prefixes its own columns. ``labels`` are the task's labels where it has fixed ones, for
    the metrics. ``chat_date`` is the day that a chat template sees, recorded so that a resumed job sees the same.
    """

    output_format: Format
    prefix: str = ""
    shard: Shard = field(default_factory=Shard)
    window_rows: int | None = None
    label_column: str | None = None
    chat_date: str | None = None
    labels: tuple[str, ...] | None = None


class Observer(Protocol):
    """Told of a job's events, for progress. Nothing that it does may change an answer."""

    def started(self, total_rows: int, resumed_rows: int, engine: ScoringEngine) -> None: ...

    def scoring(self, group: Group, num_requests: int) -> None: ...

    def finished(self, window: Window, counts: Counts) -> None: ...


class Silent:
    """The observer that does nothing."""

    def started(self, total_rows: int, resumed_rows: int, engine: ScoringEngine) -> None: ...

    def scoring(self, group: Group, num_requests: int) -> None: ...

    def finished(self, window: Window, counts: Counts) -> None: ...


def run_job(
    table: Table,
    task: Task,
    engine: ScoringEngine,
    output: Output,
    config: JobConfig,
    *,
    model: Mapping[str, str],
    output_name: str = "-",
    observer: Observer | None = None,
) -> Summary:
    """Answer every row of ``table`` and write it to ``output``.

    ``model`` names the model and its tokenizer by content (see ``fingerprint``). Answers depend on the input, the
    task, the engine's plan and the window size, never on timing. Raises InputError, UsageError or OutputError; rows
    that fail get their error in the error column.
    """
    observer = observer or Silent()
    added = (*task.columns, error_column(config.prefix))
    check_columns(table, task, added, config.label_column)
    size = WindowSize.planned(engine.limits, config.window_rows)
    windows = cut_windows(table.marks, size)
    mine = config.shard.take(windows)
    writer = open_writer(config.output_format, table, added)
    identity = job_identity(
        table,
        task,
        engine,
        model=model,
        output_format=config.output_format,
        columns=added,
        size=size,
        windows=windows,
        shard=config.shard,
        label_column=config.label_column,
        chat_date=config.chat_date,
    )
    share = sum(window.num_rows for window in mine) / table.num_rows
    done = output.begin(identity, writer, int(least_output_bytes(table, config.output_format) * share))
    resumed = Counts.total(done.values())
    begin_s, start = time.monotonic(), snapshot(engine.stats)
    counts = Counts.total([resumed])
    if not output.complete:
        observer.started(sum(window.num_rows for window in mine), resumed.rows, engine)
        missing = [window for window in mine if window.index not in done]
        for one in _answer_windows(table, task, engine, output, writer, missing, config, observer):
            counts.add(one)
        about = {"seconds": round(time.monotonic() - begin_s, 3), "labels": list(config.labels or ())}
        output.finish(mine, table.num_rows, about)
    return Summary(
        output=output_name,
        counts=counts,
        metrics=metrics_of(task.name, counts, config.labels) if config.label_column else None,
        resumed_rows=resumed.rows,
        seconds=time.monotonic() - begin_s,
        stats=since(engine.stats, start),
        peak_flops=engine.peak_flops,
    )


def _answer_windows(
    table: Table,
    task: Task,
    engine: ScoringEngine,
    output: Output,
    writer: TableWriter,
    windows: Sequence[Window],
    config: JobConfig,
    observer: Observer,
) -> Iterator[Counts]:
    """Score the given windows one after another; yields the counts of each once it is kept."""
    error_name = error_column(config.prefix).name
    answers = Answers(task, error_name, config.label_column)
    with one_ahead(_prepared(table, task, windows, engine.limits, _needed(table, task, config))) as groups:
        for group in groups:
            requests = group.requests()
            observer.scoring(group, len(requests))
            answers.add(group, engine.score(requests) if requests else [])
            if group.last:
                output.write(group.window, partial(_write, writer, group.batch, answers.rows), answers.counts)
                observer.finished(group.window, answers.counts)
                yield answers.counts
                answers = Answers(task, error_name, config.label_column)


def _write(writer: TableWriter, batch: Batch, rows: Sequence[Row], file: IO[bytes]) -> None:
    writer.write_part(file, batch, rows)


def _prepared(
    table: Table, task: Task, windows: Sequence[Window], limits: EngineLimits, columns: frozenset[str] | None
) -> Iterator[Group]:
    """Read and prepare windows; runs in the read-ahead thread. Neighbouring windows are read in one go."""
    for run in _runs(windows):
        batches = table.read(run[0].mark, [window.num_rows for window in run], columns)
        for window, batch in zip(run, batches, strict=True):
            yield from groups_of(window, batch, task, limits)


def _runs(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Cut where windows are missing in between (a resumed job may have holes)."""
    run: list[Window] = []
    for window in windows:
        if run and window.index != run[-1].index + 1:
            yield run
            run = []
        run.append(window)
    if run:
        yield run


def _needed(table: Table, task: Task, config: JobConfig) -> frozenset[str] | None:
    """The columns whose Python values are needed: all for a text format."""
    if table.format != "parquet" or config.output_format != "parquet":
        return None
    return task.placeholders | ({config.label_column} if config.label_column else set())


def check_columns(table: Table, task: Task, added: Sequence[Column], label_column: str | None) -> None:
    """Raise InputError for a column that is needed and not there, UsageError for an added one that is there already."""
    if label_column is not None:
        check_comparable(task.name)
    for name in sorted(task.placeholders | ({label_column} if label_column else set())):
        if name not in table.columns:
            close = difflib.get_close_matches(name, table.columns, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            have = ", ".join(map(repr, table.columns[:30]))
            raise InputError(f"the table has no column {name!r}{hint}; it has {have}")
    clash = [column.name for column in added if column.name in table.columns]
    if clash:
        raise UsageError(
            f"the table already has columns named {', '.join(map(repr, clash))}, which this job adds; give "
            "the added ones a prefix, "
            "for example --prefix new_"
        )


def least_output_bytes(table: Table, output_format: Format) -> int:
    """A low estimate of the space that parts and final file need, before anything is known of the answers."""
    text_in, text_out = table.format != "parquet", output_format != "parquet"
    # Parquet compresses by an unknown factor; the text of Parquet values is hardly shorter than they are.
    kept = 0.05 if not text_out else 1.0 if text_in else 0.3
    return int(2 * (table.num_bytes * kept + table.num_rows * (8 if text_out else 1)))
