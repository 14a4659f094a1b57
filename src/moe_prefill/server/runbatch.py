"""A file of batch lines answered by an engine of our own: streamed, in order, in bounded memory, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic_core import to_json

from ..config import SIZES, EngineConfig, given_sizes, with_recorded_sizes
from ..core import ScoringEngine
from ..errors import InputError, OutputError, UsageError
from ..jobs.ahead import one_ahead
from ..jobs.durable import Lock, file_digest, refusals_named, sync_directory, write_durably
from ..jobs.manifest import Identity, check_same_job
from .batchlines import Chunk, Line, read_chunks, refused_answer, reply_line
from .context import Context, Plan, Results
from .service import Answer, plan_body, refusal, salted, told

# A chunk is one call of the engine, and what a killed run loses. Its bytes bound the memory.
_CHUNK_LINES = 4096
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is done: input and output bytes, and lines by outcome. ``job``: what the replies depend on."""

    job: Identity
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
    source: Path,
    output: Path,
    context: Context,
    engine: ScoringEngine,
    *,
    resume: bool,
    overwrite: bool,
    known: Identity,
) -> Progress:
    """Answer every line of ``source`` into ``output``, in order. ``known`` comes from ``known_job``.

    Until all is done the replies are in a hidden file beside it. Answers depend on the file, the model and the
    engine's plan only, however often a run is killed and resumed. Raises UsageError, InputError and OutputError.
    """
    check_paths(source, output, resume=resume, overwrite=overwrite)
    part, journal = output.with_name(f".{output.name}.part"), _journal(output)
    with _locked(journal.with_suffix(".lock")):
        job = known | _planned_job(engine)
        done = (_recorded(output) if resume else None) or Progress(job=job)
        check_same_job(journal, done.job, job)
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


def known_job(source: Path, context: Context, model: str, settings: Mapping[str, object]) -> Identity:
    """What replies depend on, as far as it is known before the engine is built, which ``context`` does not need either.
    ``model`` names the weights by content, ``settings`` are the engine's. Raises InputError.
    """
    tasks = repr((context.rerank, context.classify)).encode()
    return {
        "input.content": file_digest(source),
        "model.weights": model,
        "model.tokenizer": context.tokenizer.fingerprint,
        "server.tasks": hashlib.sha256(tasks).hexdigest(),
        "server.served_model_name": list(context.names),
        "server.v1_rerank": context.v1_rerank,
        **{f"server.{name}": value for name, value in asdict(context.allow).items()},
        **{f"engine.{name}": value for name, value in settings.items()},
    }


def resumed_config(output: Path, known: Identity, config: EngineConfig) -> EngineConfig:
    """The settings to go on with, see ``with_recorded_sizes``. Raises OutputError for a run that cannot be gone on
    with, before its model is loaded.
    """
    done = _recorded(output)
    if done is None:
        return config
    asked = known | {f"engine.{name}": size for name, size in given_sizes(config).items()}
    check_same_job(_journal(output), {name: done.job.get(name) for name in asked}, asked)
    return with_recorded_sizes(config, lambda name: done.job.get(f"engine.{name}"))


def _recorded(output: Path) -> Progress | None:
    """How far an earlier run came; None where none has begun. Raises OutputError for one that is finished."""
    journal = _journal(output)
    if not journal.exists():
        if output.exists():
            raise OutputError(f"{output}: is finished; there is nothing to resume")
        return None
    try:
        done = Progress(**json.loads(journal.read_text(encoding="utf-8")))
        if not isinstance(done.job, dict):
            raise TypeError("it is of another version")
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{journal}: cannot be read ({error}); start anew without --resume") from error
    return done


def _planned_job(engine: ScoringEngine) -> Identity:
    sizes = {f"engine.{name}": getattr(engine.limits, name) for name in SIZES}
    return {"engine.plan": engine.plan_digest, **sizes}


def _journal(output: Path) -> Path:
    return output.with_name(f".{output.name}.batch.json")


def _write_journal(path: Path, done: Progress) -> None:
    write_durably(path, lambda file: file.write(json.dumps(asdict(done)).encode()))
