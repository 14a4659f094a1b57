"""A file of batch lines answered by an engine of our own: streamed, in order, in bounded memory, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic_core import to_json

from ..core import ScoringEngine
from ..errors import InputError, OutputError, UsageError
from ..jobs.ahead import one_ahead
from ..jobs.durable import Lock, file_digest, refusals_named, sync_directory, write_durably
from .batchlines import Chunk, Line, read_chunks, refused_answer, reply_line
from .context import Context, Plan, Results
from .service import Answer, plan_body, refusal, salted, told

# A chunk is one call of the engine, and what a killed run loses. Its bytes bound the memory.
_CHUNK_LINES = 4096
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is done: input and output bytes, and lines by outcome. ``job`` names input, model and settings."""

    job: str
    input_end: int = 0
    output_end: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def lines(self) -> int:
        return self.completed + self.failed


@dataclass(frozen=True, slots=True, eq=False)
class _Planned:
    """A chunk with each line's plan, or the answer that needs none."""

    chunk: Chunk
    plans: Sequence[Plan | Answer]


def run_batch(
    source: Path, output: Path, context: Context, engine: ScoringEngine, *, resume: bool, overwrite: bool, model: str
) -> Progress:
    """Answer every line of ``source`` into ``output``, in order. ``model`` names the weights by content.

    Until all is done the replies are in a hidden file beside it. Answers depend on the file, the model and the
    engine's plan only, however often a run is killed and resumed. Raises UsageError, InputError and OutputError.
    """
    check_paths(source, output, resume=resume, overwrite=overwrite)
    part, journal = (output.with_name(f".{output.name}.{end}") for end in ("part", "batch.json"))
    with _locked(journal.with_suffix(".lock")):
        job = _job_name(source, context, engine, model)
        done = _resumed(journal, job, output) if resume else Progress(job=job)
        with refusals_named(part), part.open("r+b" if part.exists() and done.output_end else "wb") as file:
            file.truncate(done.output_end)
            file.seek(done.output_end)
            with one_ahead(_planned(source, done, context)) as chunks:
                for planned in chunks:
                    replies, completed = _answer(planned, engine)
                    file.write(b"".join(replies))
                    file.flush()
                    os.fsync(file.fileno())
                    done = replace(
                        done,
                        input_end=planned.chunk.end,
                        output_end=file.tell(),
                        completed=done.completed + completed,
                        failed=done.failed + len(replies) - completed,
                    )
                    _write_journal(journal, done)
            part.replace(output)
            sync_directory(output.parent)
        journal.unlink(missing_ok=True)
    return done


def check_paths(source: Path, output: Path, *, resume: bool, overwrite: bool) -> None:
    """Find out before a model is loaded. Raises InputError, OutputError and UsageError."""
    for path in (source, output):
        if ":/" in str(path):
            raise UsageError(f"{path}: run-batch reads and writes files; nothing is fetched from or sent to a URL")
    if not source.is_file():
        raise InputError(f"{source}: is no file")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: is no directory")
    if output.exists() and (output.is_dir() or source.resolve() == output.resolve()):
        raise OutputError(f"{output}: is a directory, or the input itself")
    if output.exists() and not (resume or overwrite):
        raise OutputError(f"{output}: exists; give --overwrite to replace it, or another name")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = Lock(path)
    try:
        yield
        path.unlink(missing_ok=True)
    finally:
        lock.release()


def _planned(source: Path, done: Progress, context: Context) -> Iterator[_Planned]:
    """Read and plan chunks; runs in the read-ahead thread."""
    for chunk in read_chunks(source, done.input_end, done.lines + 1, _CHUNK_LINES, _CHUNK_BYTES):
        yield _Planned(chunk, [_plan(line, context) for line in chunk.lines])


def _plan(line: Line, context: Context) -> Plan | Answer:
    if line.endpoint is None:
        return refused_answer(line)
    try:
        plan, salt = plan_body(line.endpoint, context, line.body)
        return Plan(salted(plan.requests, "", salt), plan.finish)
    except Exception as error:
        return refusal(told(error), line.endpoint.forms[-1].dialect)


def _answer(planned: _Planned, engine: ScoringEngine) -> tuple[list[bytes], int]:
    """One call of the engine for all lines of a chunk; the reply lines, and how many are no errors."""
    requests = [request for plan in planned.plans if isinstance(plan, Plan) for request in plan.requests]
    results: Results = engine.score(requests) if requests else []
    replies, completed, start = [], 0, 0
    for line, plan in zip(planned.chunk.lines, planned.plans, strict=True):
        answer = plan if isinstance(plan, Answer) else _finish(line, plan, results[start : start + len(plan.requests)])
        start += len(plan.requests) if isinstance(plan, Plan) else 0
        replies.append(reply_line(line, answer))
        completed += answer.status == 200
    return replies, completed


def _finish(line: Line, plan: Plan, results: Results) -> Answer:
    assert line.endpoint is not None
    try:
        return Answer(status=200, body=to_json(plan.finish(results), inf_nan_mode="null"))
    except Exception as error:
        return refusal(told(error), line.endpoint.forms[-1].dialect)


def _job_name(source: Path, context: Context, engine: ScoringEngine, model: str) -> str:
    facts = (file_digest(source), model, engine.plan_digest, context.tokenizer.fingerprint)
    settings = (context.names, context.allow, context.rerank, context.classify, context.v1_rerank)
    return hashlib.sha256(repr((facts, settings)).encode()).hexdigest()[:32]


def _resumed(journal: Path, job: str, output: Path) -> Progress:
    if not journal.exists():
        if output.exists():
            raise OutputError(f"{output}: is finished; there is nothing to resume")
        return Progress(job=job)
    try:
        done = Progress(**json.loads(journal.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{journal}: cannot be read ({error}); start anew without --resume") from error
    if done.job != job:
        raise OutputError(
            f"{journal}: belongs to another run: input, model, plan or settings changed; start anew without --resume"
        )
    return done


def _write_journal(path: Path, done: Progress) -> None:
    write_durably(path, lambda file: file.write(json.dumps(asdict(done)).encode()))
