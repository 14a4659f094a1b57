"""``moe-prefill run-batch``."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..errors import UsageError
from ..server.settings import ServerConfig, read_settings
from .fields import given, keyword, make_command, option, parameters_of
from .flags import ENGINE_FLAGS, RunOptions
from .loading import loading
from .serve import SERVER_FLAGS, check_extra

_SETTINGS = (
    "served_model_name",
    "tokenizer",
    "default_max_tokens",
    "rerank_task",
    "classify_task",
    "v1_rerank",
    "max_rows",
    "max_logprobs",
    "max_label_ids",
)


def _run_batch(
    source: str | None,
    output: str | None,
    config: str | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    **values: Any,
) -> None:
    if source is None or output is None:
        raise UsageError("-i INPUT and -o OUTPUT are needed: files of JSON lines")
    values.pop("debug")
    server, engine = read_settings({**given(values, ServerConfig), **given(values, EngineConfig)}, os.environ, config)
    check_extra()
    from ..checkpoint import resolve_directory
    from ..engine import plan_settings
    from ..jobs import model_fingerprint
    from ..server.run import UNBOUNDED, prepare
    from ..server.runbatch import check_paths, known_job, resumed_config, run_batch
    from ..workers import build_scoring

    check_paths(Path(source), Path(output), resume=resume, overwrite=overwrite)
    context_of = prepare(server, engine)
    dummy = engine.load_format == "dummy"
    model = repr(engine) if dummy else model_fingerprint(resolve_directory(engine.model, revision=engine.revision))
    known = known_job(Path(source), context_of(UNBOUNDED), model, plan_settings(engine))
    if resume:
        engine = resumed_config(Path(output), known, engine)
    begin_s = time.monotonic()
    with loading(engine, RunOptions(quiet=quiet)):
        scoring = build_scoring(engine)
    with closing(scoring):
        context = context_of(scoring.limits)
        done = run_batch(Path(source), Path(output), context, scoring, resume=resume, overwrite=overwrite, known=known)
    if not quiet:
        facts = {"output": output, "lines": done.lines, "completed": done.completed, "failed": done.failed}
        print(json.dumps({**facts, "seconds": round(time.monotonic() - begin_s, 3)}))


def _parameters() -> list[Any]:
    flags = {name: SERVER_FLAGS[name] for name in _SETTINGS}
    own = {
        "source": option(str | None, None, "--input", "-i", metavar="FILE.jsonl", help="Batch lines in OpenAI's form."),
        "output": option(str | None, None, "--output", "-o", metavar="FILE.jsonl", help="Replies, in the same order."),
        "resume": option(bool, False, "--resume", help="Go on with a run that was stopped."),
        "overwrite": option(bool, False, "--overwrite", help="Replace an output that exists."),
        "config": option(str | None, None, "--config", metavar="FILE.toml", help="Settings, as of serve."),
        "quiet": option(bool, False, "--quiet", "-q", help="No summary."),
        "debug": option(bool, False, "--debug", help="Show the traceback of an error."),
    }
    return [
        *(keyword(name, annotation, default) for name, (annotation, default) in own.items()),
        *parameters_of(ServerConfig, flags),
        *parameters_of(EngineConfig, ENGINE_FLAGS),
    ]


run_batch = make_command(_parameters(), _run_batch, "Answer a file of batch lines (every endpoint of serve).")
