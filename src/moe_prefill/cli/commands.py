"""The task commands: options in, a finished job out."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig, given_sizes, with_recorded_sizes
from ..core import EngineLimits
from ..errors import InputError, TaskError, UsageError
from ..jobs import (
    FileOutput,
    Identity,
    JobConfig,
    Output,
    Shard,
    StreamOutput,
    Summary,
    added_columns,
    check_columns,
    finished_summary,
    known_identity,
    model_fingerprint,
    run_job,
)
from ..jobs.output import check_place
from ..jobs.spool import spool
from ..jobs.tables import Format, Table, check_format, choose_format, find_files, format_of, open_table
from ..tasks import ChooseConfig, ClassifyConfig, Task, TaskConfig, build_task, config_from_mapping, read_task_file
from ..tasks.taskfile import CONFIGS
from .fields import given
from .flags import RunOptions

if TYPE_CHECKING:
    from ..text import Tokenizer

_UNBOUNDED = 2**31 - 1
_ESCAPE = re.compile(r"\\[nt]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command line, read and typed."""

    kind: str
    source: str
    run: RunOptions
    shard: Shard
    task: TaskConfig
    engine: EngineConfig

    @classmethod
    def read(cls, kind: str, source: str, values: dict[str, Any]) -> Request:
        """Type the options; those given beside a task file win over it. Raises UsageError and TaskError."""
        run = RunOptions(**given(values, RunOptions))
        if not values.get("model"):
            raise UsageError("--model is needed: a directory or a hub id")
        for name, rows in (("--limit", run.limit), ("--window-rows", run.window_rows)):
            if rows is not None and rows < 1:
                raise UsageError(f"{name} is {rows}; it must be at least 1")
        engine = EngineConfig(**given(values, EngineConfig))
        shard = Shard.parse(run.shard) if run.shard else Shard()
        task = _task_config(kind, values, run.task)
        return cls(kind=kind, source=source, run=run, shard=shard, task=task, engine=engine)

    @property
    def output_format(self) -> Format:
        """From --output-format, else from the output's name; JSONL on standard output."""
        if str(self.run.output).endswith(".gz"):
            raise UsageError(f"-o {self.run.output}: output is not compressed; leave .gz out, and run gzip afterwards")
        if self.run.output_format is not None:
            return check_format(self.run.output_format)
        if self.run.output in (None, "-"):
            return "jsonl"
        path = Path(str(self.run.output))
        found = format_of(path, gzip=False)
        if found is None:
            check_place(path.resolve())
            raise UsageError(
                f"-o {self.run.output}: the name does not say the format; give --output-format csv|tsv|jsonl|parquet"
            )
        return found


def run_task(kind: str, source: str, values: dict[str, Any]) -> None:
    """Run one of the task commands."""
    from .dry_run import show
    from .report import report

    request = Request.read(kind, source, values)
    if request.run.dry_run:
        with _files(request) as files:
            show(request, _open(request, files), _tokenizer(request))
        return
    with closing(_output(request)) as output, _files(request, output) as files:
        report(_run(request, output, _open(request, files)), request.run)


def _run(request: Request, output: Output, table: Table) -> Summary:
    from ..engine import plan_settings
    from ..workers import build_scoring
    from .loading import loading
    from .progress import observer_for

    request = replace(request, task=_dated(request.task, output), engine=_pinned(request.engine))
    tokenizer = _tokenizer(request)
    task, job = checked_task(request, table, tokenizer), _job_config(request)
    config, model = _engine_config(request, output), _model_identity(request, tokenizer)
    settings = plan_settings(config)
    if isinstance(output, FileOutput):
        certain = _certain(request, known_identity(table, task, job, model, settings), config)
        output.check(certain)
        finished = output.finished()
        if finished is not None and "task.digest" in certain:
            return finished_summary(task, job, finished, str(request.run.output))
    with loading(config, request.run):
        scoring = build_scoring(config)
    with closing(scoring) as engine, observer_for(request.run) as observer:
        return run_job(
            table,
            build_task(request.task, tokenizer, engine.limits, table.columns),
            engine,
            output,
            job,
            model=model,
            settings=settings,
            output_name=str(request.run.output),
            observer=observer,
        )


def checked_task(request: Request, table: Table, tokenizer: Tokenizer) -> Task:
    """The task without a plan's limits: finds what is wrong with it and with columns before the weights are loaded,
    which can take minutes.
    """
    limits = EngineLimits(max_request_tokens=_UNBOUNDED, max_sweep_tokens=_UNBOUNDED, vocab_size=tokenizer.vocab_size)
    task = build_task(request.task, tokenizer, limits, table.columns)
    check_columns(table, task, added_columns(task, request.task.output_prefix), request.run.label_column)
    return task


def _certain(request: Request, known: Identity, config: EngineConfig) -> Identity:
    """What the finished identity will say for certain: a digest of a truncating task holds the plan's longest request;
    sizes that are given are kept.
    """
    certain = known | {f"engine.{name}": size for name, size in given_sizes(config).items()}
    return {name: value for name, value in certain.items() if name != "task.digest" or request.task.truncate == "error"}


def _task_config(kind: str, values: dict[str, Any], path: str | None) -> TaskConfig:
    options = given(values, CONFIGS[kind])
    _check_line_ends(options)
    if path is None:
        return config_from_mapping(kind, options)
    in_file, keys = read_task_file(path)
    if in_file != kind:
        raise TaskError(f"{path}: is a task of kind {in_file!r}; run `moe-prefill {in_file}`")
    return config_from_mapping(kind, {**keys, **options}, path)


def _check_line_ends(options: Mapping[str, object]) -> None:
    """Raise UsageError for a text in which the shell left \\n as two characters: no label ends so, and no prompt."""
    for name, text in options.items():
        if isinstance(text, str) and (found := _ESCAPE.search(text)):
            letter = found[0][1]
            raise UsageError.about(
                name,
                f"holds {found[0]} as two characters, a backslash and {letter!r}; in bash and zsh write $'...{found[0]}"
                "...' for the character, or put the text into a task file, which takes both",
            )


def _output(request: Request) -> FileOutput | StreamOutput:
    run = request.run
    if run.output is None:
        raise UsageError("-o OUTPUT is needed: a file, or - for standard output")
    kind = request.output_format
    if run.output != "-":
        return FileOutput(Path(run.output), resume=run.resume, overwrite=run.overwrite)
    if kind == "parquet" or run.resume or run.shard:
        raise UsageError("standard output takes CSV, TSV and JSONL, without --resume and --shard; give -o FILE")
    return StreamOutput()


@contextmanager
def _files(request: Request, output: Output | None = None) -> Iterator[list[Path]]:
    """The input's files; standard input is kept with the parts, where it can be resumed, else for this run only."""
    if request.source != "-":
        files = find_files(request.source)
        if isinstance(output, FileOutput) and any(path.resolve() == output.path for path in files):
            raise InputError(f"{output.path}: is among the input files; write the output elsewhere")
        yield files
        return
    suffix = f".{_stdin_format(request)}"
    if isinstance(output, FileOutput):
        yield [spool(sys.stdin.buffer, output.spool_path(suffix))]
        return
    with tempfile.TemporaryDirectory() as directory:
        yield [spool(sys.stdin.buffer, Path(directory) / f"input{suffix}")]


def _stdin_format(request: Request) -> Format:
    if request.run.input_format is None:
        raise UsageError("standard input needs --format csv|tsv|jsonl|parquet")
    return check_format(request.run.input_format)


def _open(request: Request, files: list[Path]) -> Table:
    return open_table(
        files,
        choose_format(files, request.run.input_format),
        limit=request.run.limit,
        window_rows=request.run.window_rows,
        infer_schema=request.output_format == "parquet",
    )


def _tokenizer(request: Request) -> Tokenizer:
    from ..checkpoint import resolve_directory
    from ..text import Tokenizer

    source = request.run.tokenizer or request.engine.model
    revision = request.engine.revision if source == request.engine.model else None
    return Tokenizer.from_directory(resolve_directory(source, revision=revision, weights=False))


def _pinned(engine: EngineConfig) -> EngineConfig:
    """A hub model at the commit that its revision names now, so that all of its files are of one state."""
    from ..checkpoint import pinned_revision

    if engine.load_format == "dummy":
        return engine
    return replace(engine, revision=pinned_revision(engine.model, engine.revision))


def _dated(task: TaskConfig, output: Output) -> TaskConfig:
    """A resumed chat job goes on with the day that it began on."""
    if not task.chat or task.chat_date is not None:
        return task
    recorded = output.recorded("task.chat_date") if isinstance(output, FileOutput) else None
    today = datetime.now().astimezone().date().isoformat()
    return replace(task, chat_date=recorded if isinstance(recorded, str) else today)


def _engine_config(request: Request, output: Output) -> EngineConfig:
    """A resumed job takes the sizes that it started with. Where banks live does not matter to its answers."""
    if not isinstance(output, FileOutput):
        return request.engine
    return with_recorded_sizes(request.engine, lambda name: output.recorded(f"engine.{name}"))


def _job_config(request: Request) -> JobConfig:
    return JobConfig(
        output_format=request.output_format,
        prefix=request.task.output_prefix,
        shard=request.shard,
        window_rows=request.run.window_rows,
        label_column=request.run.label_column,
        chat_date=request.task.chat_date,
        labels=_answers(request.task),
    )


def _answers(task: TaskConfig) -> tuple[str, ...] | None:
    """The answers that a task can give, where they are the same for all rows; others in a gold column are counted
    apart.
    """
    if isinstance(task, ClassifyConfig):
        return tuple(label.name for label in task.labels)
    return task.names if isinstance(task, ChooseConfig) else None


def _model_identity(request: Request, tokenizer: Tokenizer) -> dict[str, str]:
    from ..checkpoint import resolve_directory

    engine = request.engine
    if engine.load_format == "dummy":
        weights = f"dummy {engine.model} layers={engine.num_layers} seed={engine.seed} skew={engine.dummy_skew}"
    else:
        weights = model_fingerprint(resolve_directory(engine.model, revision=engine.revision))
    revision = {"revision": engine.revision} if engine.revision is not None else {}
    return {"weights": weights, "tokenizer": tokenizer.fingerprint, **revision}
