"""Names and help of every option. Types and defaults come from the config dataclasses (see ``fields``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .fields import Flag, dashed

_PROMPT, _ANSWER, _ENGINE = "Prompt", "Task", "Engine"

TASK_FLAGS = {
    "template": Flag(help="Prompt with {column} placeholders.", panel=_PROMPT),
    "text_column": Flag(help="The column that the built-in prompt reads.", panel=_PROMPT),
    "system": Flag(help="System message, with --chat.", panel=_PROMPT),
    "chat": Flag(help="Apply the model's chat template, thinking off.", panel=_PROMPT),
    "chat_date": Flag(help="The day (ISO) that a chat template sees as today.", panel=_PROMPT),
    "label_prefix": Flag(help="Text between the context and every candidate.", panel=_PROMPT),
    "boundary": Flag(help="Where a label merges with the context: strict (row error) or split.", panel=_PROMPT),
    "truncate": Flag(help="Which end of a text that is too long is cut: error, left, right or middle.", panel=_PROMPT),
    "output_prefix": Flag(
        help="Put this before the names of the added columns.", names=("--prefix", "--output-prefix")
    ),
    "labels": Flag(help="The classes: a,b,c or a JSON list.", panel=_ANSWER),
    "normalize": Flag(help="Probabilities over the candidates or over the vocabulary.", panel=_ANSWER),
    "length_normalize": Flag(help="Divide a label's log-probability by its number of tokens.", panel=_ANSWER),
    "label_end": Flag(help='Text that closes every label, or "<eos>".', panel=_ANSWER),
    "options": Flag(help="The options, the same for every row.", panel=_ANSWER),
    "option_columns": Flag(help="Columns that hold one option each.", panel=_ANSWER),
    "options_column": Flag(help="The column that holds the list of options.", panel=_ANSWER),
    "identifiers": Flag(help="Name the options by letters or digits.", panel=_ANSWER),
    "candidates": Flag(help="The candidates, the same for every row.", panel=_ANSWER),
    "candidates_column": Flag(help="The column that holds the list of candidates.", panel=_ANSWER),
    "yes": Flag(help="The word that accepts a candidate.", panel=_ANSWER),
    "no": Flag(help="The word that rejects a candidate.", panel=_ANSWER),
    "threshold": Flag(help="Accept candidates from this probability on.", panel=_ANSWER),
    "top_n": Flag(help="Keep the best N candidates only.", panel=_ANSWER),
    "continuation": Flag(help="The text that is scored, with {column} placeholders.", panel=_ANSWER),
    "token_ids_column": Flag(help="The column that holds prompts as token ids.", panel=_ANSWER),
    "positions_column": Flag(help="The column that holds the asked positions.", panel=_ANSWER),
    "candidate_ids_column": Flag(help="The column that holds the ids to score at each position.", panel=_ANSWER),
    "top_k": Flag(help="Also give the K most likely tokens of each position.", panel=_ANSWER),
}

ENGINE_FLAGS = {
    "model": Flag(
        help="Model directory or hub id (with --load-format dummy: also a preset's name).", names=("--model", "-m")
    ),
    "revision": Flag(help="Branch, tag or commit of a hub model; default: main.", panel=_ENGINE),
    "device": Flag(help="auto, cpu or cuda.", panel=_ENGINE),
    "gpus": Flag(
        help="Worker processes: one a GPU, or a share of the CPU each. Default: none but this one.", panel=_ENGINE
    ),
    "dtype": Flag(help="auto, float32 or bfloat16.", panel=_ENGINE),
    "quantization": Flag(
        help="fp8: keep linear maps and experts in 8 bits; checkpoints in float8 are so without it.", panel=_ENGINE
    ),
    "load_format": Flag(help="dummy makes random weights, for speed tests.", panel=_ENGINE),
    "seed": Flag(help="Seed of dummy weights.", panel=_ENGINE),
    "dummy_skew": Flag(help="How unevenly dummy routers choose experts.", panel=_ENGINE),
    "num_layers": Flag(help="Depth of a dummy model.", panel=_ENGINE),
    "sharing": Flag(help="Compute common prefixes once: auto (where it pays), off, or force.", panel=_ENGINE),
    "max_sweep_tokens": Flag(help="Tokens of one sweep; default: what the memory plan allows.", panel=_ENGINE),
    "memory_gib": Flag(help="Memory to use of each device.", names=("--hbm-gib", "--memory-gib"), panel=_ENGINE),
    "host_gib": Flag(help="Host memory to use.", panel=_ENGINE),
    "kv_gib": Flag(
        help="Memory of each device that keeps prefixes from sweep to sweep; 0: none. Default: by the memory plan in "
        "serve, none in jobs.",
        panel=_ENGINE,
    ),
    "trace": Flag(help="Write copies and compute of every sweep as a Chrome trace.", panel=_ENGINE, metavar="FILE"),
    "check_finite": Flag(
        help="Refuse weights that are not finite, and say which part of which layer first gives NaN or infinity.",
        names=("--check-finite",),
        panel=_ENGINE,
    ),
    "threads": Flag(help="CPU threads of each process.", panel=_ENGINE),
    "residency": Flag(
        help="Where expert banks live: auto, one level (resident, sharded, offloaded, hybrid), counts "
        "(resident:10,offloaded:38) or one a layer.",
        panel=_ENGINE,
    ),
    "prefetch_depth": Flag(help="Banks that fill ahead of the one in use.", panel=_ENGINE),
    "transport": Flag(
        help="How GPUs get each other's parts of sharded banks: copy-engine, or nccl for comparison and for GPUs "
        "without peer access.",
        panel=_ENGINE,
    ),
    "chunk_rows": Flag(help="Rows that go through a layer at a time.", panel=_ENGINE),
    "profile": Flag(help="Rates of this machine, from moe-prefill calibrate.", metavar="FILE", panel=_ENGINE),
    "strategy": Flag(help="How GPUs share the model: asyncep, or dp+ep, dp+tp, tp+ep, tp+tp, pp+pp.", panel=_ENGINE),
    "micro_batches": Flag(help="Parts of a sweep that move through a pipeline (pp+pp).", panel=_ENGINE),
}

JOB_FLAGS = {
    "output": Flag(
        help="Output file (.csv, .tsv, .jsonl, .parquet), or - for standard output.", names=("--output", "-o")
    ),
    "task": Flag(help="Task file (TOML); options given beside it win.", metavar="FILE.toml"),
    "tokenizer": Flag(help="Directory or hub id of the tokenizer; default: the model's."),
    "input_format": Flag(help="Format of the input where its name does not say it.", names=("--format",)),
    "output_format": Flag(help="Format of the output where its name does not say it."),
    "limit": Flag(help="Only the first N rows."),
    "shard": Flag(help="This host's part of the job, for example 1/8; see merge.", metavar="I/N"),
    "resume": Flag(help="Go on with a job that was stopped.", names=("--resume",)),
    "overwrite": Flag(help="Replace an output, or parts of an earlier job.", names=("--overwrite",)),
    "label_column": Flag(help="Column with the right answers: prints accuracy, F1 and a confusion table."),
    "window_rows": Flag(help="Rows of a window at most; default: from the engine's plan."),
    "dry_run": Flag(help="Show prompts, tokens and boundaries; compute nothing.", names=("--dry-run",)),
    "quiet": Flag(help="No progress and no summary.", names=("--quiet", "-q")),
    "json": Flag(help="Progress and summary as JSON lines.", names=("--json",)),
    "debug": Flag(help="Show the traceback of an error.", names=("--debug",)),
}


PLAN_ENGINE_FLAGS = {
    name: dataclasses.replace(ENGINE_FLAGS[name], panel=None)
    for name in (
        "memory_gib",
        "revision",
        "strategy",
        "dtype",
        "quantization",
        "residency",
        "max_sweep_tokens",
        "chunk_rows",
        "prefetch_depth",
        "transport",
        "kv_gib",
        "profile",
    )
} | {
    "model": Flag(help="A preset's name, a model directory or a hub id.", names=("--model", "-m")),
    "num_layers": Flag(help="Plan for this depth."),
    "gpus": Flag(help="GPUs of one host; default: 1."),
    "host_gib": Flag(help="Host memory; default: no limit."),
}

PLAN_FLAGS = {
    "gpu": Flag(help="Without a profile: estimate from this GPU's datasheet."),
    "tokens_per_request": Flag(help="Length of requests that speed is predicted for."),
    "json": Flag(help="One JSON object.", names=("--json",)),
    "debug": Flag(help="Show the traceback of an error.", names=("--debug",)),
}


def typed_flag(field: str, arguments: Sequence[str]) -> str | None:
    """The option by which ``arguments`` set a field; None where a file or the environment does."""
    flag = (ENGINE_FLAGS | TASK_FLAGS).get(field)
    names = (flag and flag.names) or (dashed(field),)
    given = {argument.partition("=")[0] for argument in arguments}
    return next((name for name in names if name in given), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options of a run that are neither the task's nor the engine's."""

    output: str | None = None
    task: str | None = None
    tokenizer: str | None = None
    input_format: str | None = None
    output_format: str | None = None
    limit: int | None = None
    shard: str | None = None
    resume: bool = False
    overwrite: bool = False
    label_column: str | None = None
    window_rows: int | None = None
    dry_run: bool = False
    quiet: bool = False
    json: bool = False
    debug: bool = False
