"""Run a task over a table: windows in order, each read, prepared, scored, finished and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import IO, TYPE_CHECKING, Protocol

from ..core import AtomicResult, Column, RunStats, ScoringEngine, StartingEngine
from ..errors import InputError, UsageError, did_you_mean
from .ahead import one_ahead
from .answers import Answers, Group, added_columns, groups_of
from .compare import check_comparable, metrics_of
from .config import JobConfig
from .counts import Counts
from .manifest import Identity, known_identity, planned_identity
from .output import Output
from .summary import Summary, since, snapshot
from .tables import Batch, Format, Row, Table, TableWriter, open_writer
from .windows import Window, WindowSize, cut_windows

if TYPE_CHECKING:
    from ..tasks import Task


# A group, the number of its requests, and what waits for their answers.
_Started = tuple[Group, int, Callable[[], list[AtomicResult | Exception]]]


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
    settings: Mapping[str, object] | None = None,
    output_name: str = "-",
    observer: Observer | None = None,
) -> Summary:
    """Answer every row of ``table`` and write it to ``output``.

    ``model`` names the model and its tokenizer by content, ``settings`` are the engine's, as far as they were known
    before it was built. Answers depend on the input, the task, the engine's plan and the window size, never on timing.
    Raises InputError, UsageError or OutputError; a row that fails gets its error in the error column.
    """
    job = _Job(table, task, engine, output, config, observer or Silent())
    begin_s, start = time.monotonic(), snapshot(engine.stats)
    resumed, counts = job.run(model, settings or {})
    return replace(
        finished_summary(task, config, counts, output_name),
        resumed_rows=resumed.rows,
        seconds=time.monotonic() - begin_s,
        stats=since(engine.stats, start),
        peak_flops=engine.peak_flops,
    )


def finished_summary(task: Task, config: JobConfig, counts: Counts, output_name: str) -> Summary:
    """Of a job that earlier runs have finished."""
    metrics = metrics_of(task.name, counts, config.labels) if config.label_column else None
    return Summary(output=output_name, counts=counts, metrics=metrics, resumed_rows=counts.rows, stats=RunStats())


class _Job:
    """One job: what it works with, its windows, and the loop over them."""

    def __init__(
        self, table: Table, task: Task, engine: ScoringEngine, output: Output, config: JobConfig, observer: Observer
    ) -> None:
        self.table, self.task, self.engine, self.output = table, task, engine, output
        self.config, self.observer = config, observer
        self.added = added_columns(task, config.prefix)
        check_columns(table, task, self.added, config.label_column)
        self.size = WindowSize.planned(engine.limits, config.window_rows)
        self.all_windows = cut_windows(table.marks, self.size)
        self.windows = config.shard.take(self.all_windows)
        self.num_rows = sum(window.num_rows for window in self.windows)
        self.writer = open_writer(config.output_format, table, self.added)

    def run(self, model: Mapping[str, str], settings: Mapping[str, object]) -> tuple[Counts, Counts]:
        """Compute what is missing and finish the output; returns the counts of earlier runs and of all."""
        begin_s = time.monotonic()
        least = least_output_bytes(self.table, self.config.output_format) * self.num_rows // self.table.num_rows
        done = self.output.begin(self._identity(model, settings), self.writer, least)
        resumed = Counts.total(done.values())
        counts = Counts.total([resumed])
        if not self.output.complete:
            self.observer.started(self.num_rows, resumed.rows, self.engine)
            for one in self._answer([window for window in self.windows if window.index not in done]):
                counts.add(one)
            about = {"seconds": round(time.monotonic() - begin_s, 3), "labels": list(self.config.labels or ())}
            self.output.finish(self.windows, self.table.num_rows, about)
        return resumed, counts

    def _answer(self, windows: Sequence[Window]) -> Iterator[Counts]:
        """Score windows one after another; yields the counts of each once it is kept."""
        answers = self._answers()
        with one_ahead(self._prepared(windows)) as groups:
            for group, num_requests, wait in _started(groups, self.engine):
                self.observer.scoring(group, num_requests)
                answers.add(group, wait())
                if group.last:
                    write = partial(_write, self.writer, group.batch, answers.rows)
                    self.output.write(group.window, write, answers.counts)
                    self.observer.finished(group.window, answers.counts)
                    yield answers.counts
                    answers = self._answers()

    def _prepared(self, windows: Sequence[Window]) -> Iterator[Group]:
        """Read and prepare windows; runs in the read-ahead thread. Neighbouring windows are read in one go."""
        for run in _runs(windows):
            batches = self.table.read(run[0].mark, [window.num_rows for window in run], self._needed())
            for window, batch in zip(run, batches, strict=True):
                yield from groups_of(window, batch, self.task, self.engine.limits)

    def _answers(self) -> Answers:
        return Answers(self.task, self.added[-1].name, self.config.label_column)

    def _needed(self) -> frozenset[str] | None:
        """The columns whose Python values are needed: all for a text format."""
        if self.table.format != "parquet" or self.config.output_format != "parquet":
            return None
        label = self.config.label_column
        return frozenset(self.task.placeholders | ({label} if label else set()))

    def _identity(self, model: Mapping[str, str], settings: Mapping[str, object]) -> Identity:
        known = known_identity(self.table, self.task, self.config, model, settings)
        return known | planned_identity(self.engine, self.size, self.all_windows)


def _started(groups: Iterable[Group], engine: ScoringEngine) -> Iterator[_Started]:
    """Each group with the number of its requests and the call that waits for its answers. An engine that can begins
    with the next group before this one is waited for, so that no worker is idle while the last of a window are busy.
    """
    if not isinstance(engine, StartingEngine):
        for group in groups:
            requests = group.requests()
            yield group, len(requests), partial(engine.score, requests) if requests else list
        return
    before: _Started | None = None
    for group in groups:
        requests = group.requests()
        started = group, len(requests), engine.start(requests)
        if before is not None:
            yield before
        before = started
    if before is not None:
        yield before


def _write(writer: TableWriter, batch: Batch, rows: Sequence[Row], file: IO[bytes]) -> None:
    writer.write_part(file, batch, rows)


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


def check_columns(table: Table, task: Task, added: Sequence[Column], label_column: str | None) -> None:
    """Raise InputError for a column that is needed and not there, UsageError for an added one that is there already."""
    if label_column is not None:
        check_comparable(task.name)
    for name in sorted(task.placeholders | ({label_column} if label_column else set())):
        if name not in table.columns:
            have = ", ".join(map(repr, table.columns[:30]))
            raise InputError(f"the table has no column {name!r}{did_you_mean(name, table.columns)}; it has {have}")
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
