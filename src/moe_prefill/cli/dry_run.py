"""What a job would ask, without weights: prompts with their tokens and boundaries, and how many tokens there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ..config import EngineConfig
from ..core import EngineLimits, PreparedRow
from ..errors import RowError
from ..jobs import added_columns, check_columns
from ..jobs.metrics import rows_text
from ..jobs.tables import Table
from ..tasks import Preview, Task, build_task
from .job_time import predict_job
from .progress import duration

if TYPE_CHECKING:
    from ..text import Tokenizer
    from .commands import Request

_SHOWN_ROWS = 3
_SAMPLE_ROWS = 256
_TAIL_TOKENS = 48  # of a context that is shown; its start is rarely in doubt


def show(request: Request, table: Table, tokenizer: Tokenizer) -> None:
    """Print the first prompts, the size of a sample, and what it says of the whole table."""
    console = Console(highlight=False)
    task = build_task(request.task, tokenizer, _limits(request, tokenizer), table.columns)
    check_columns(table, task, added_columns(task, request.task.output_prefix), request.run.label_column)
    batch = next(table.read(0, [min(_SAMPLE_ROWS, table.num_rows)], task.placeholders))
    absent = dict.fromkeys(task.placeholders)
    prepared = task.prepare([{**absent, **row} for row in batch.rows])
    for index, row in enumerate(prepared[:_SHOWN_ROWS]):
        _show_row(console, index, row, task, tokenizer)
    _show_size(console, table, prepared)
    _show_time(console, request.engine, table.num_rows, prepared)


def _limits(request: Request, tokenizer: Tokenizer) -> EngineLimits:
    """The longest request of the model itself; a memory plan, made where the job runs, may allow less."""
    longest = _max_positions(request) or 2**31 - 1
    return EngineLimits(max_request_tokens=longest, max_sweep_tokens=longest, vocab_size=tokenizer.vocab_size)


def _max_positions(request: Request) -> int | None:
    from ..checkpoint import read_config, resolve_directory

    if request.engine.load_format == "dummy":
        return None
    config = read_config(resolve_directory(request.engine.model, revision=request.engine.revision, weights=False))
    value = config.get("max_position_embeddings")
    return value if isinstance(value, int) else None


def _show_row(console: Console, index: int, row: PreparedRow | RowError, task: Task, tokenizer: Tokenizer) -> None:
    console.print(f"\nrow {index + 1}", style="bold")
    if isinstance(row, RowError):
        console.print(f"error {row.code}: {row}", style="red", markup=False)
        return
    if row.notes:
        console.print(f"notes: {', '.join(row.notes)}", markup=False)
    for preview in task.preview(row):
        console.print(_prompt(preview, tokenizer), soft_wrap=True)


def _prompt(preview: Preview, tokenizer: Tokenizer) -> Text:
    """Tokens of the context's end in alternating colours, then each candidate after the boundary."""
    ids = preview.context.tolist()
    hidden = max(0, len(ids) - _TAIL_TOKENS)
    text = Text(f"context, {len(ids):,} tokens: " + (f"[{hidden:,} tokens] " if hidden else ""))
    _add_tokens(text, ids[hidden:], tokenizer)
    for name, candidate in preview.candidates:
        text.append("\n  boundary ")
        _add_tokens(text, candidate, tokenizer)
        text.append(f"  <- {name!r}, {len(candidate)} token{'s' * (len(candidate) != 1)}", style="dim")
    return text


def _add_tokens(text: Text, ids: Sequence[int], tokenizer: Tokenizer) -> None:
    for index, token in enumerate(ids):
        text.append("|", style="bright_black")
        text.append(tokenizer.token_string(int(token)), style="cyan" if index % 2 else "green")
    text.append("|", style="bright_black")


def _show_size(console: Console, table: Table, prepared: Sequence[PreparedRow | RowError]) -> None:
    good = [row for row in prepared if isinstance(row, PreparedRow)]
    errors = len(prepared) - len(good)
    lengths = [len(request.tokens) for row in good for request in row.requests]
    console.print(f"\n{rows_text(table.num_rows)}; errors among the first {len(prepared):,}: {errors:,}")
    if not lengths:
        return
    total = sum(lengths) * table.num_rows // len(prepared)
    console.print(
        f"{len(lengths) / len(good):.1f} requests a row, {sum(lengths) / len(lengths):,.0f} tokens a request (longest "
        f"{max(lengths):,}); about {total:,} tokens in all, before prefixes are shared",
        soft_wrap=True,
    )


def _show_time(
    console: Console, config: EngineConfig, num_rows: int, prepared: Sequence[PreparedRow | RowError]
) -> None:
    """The cost model's prediction for the sample, scaled to the table."""
    requests = [request for row in prepared if isinstance(row, PreparedRow) for request in row.requests]
    if not requests:
        return
    share = num_rows / len(prepared)
    found = predict_job(config, requests, int(share))
    if found is None:
        console.print(
            "time: nothing is known of this device's speed; run moe-prefill calibrate and give --profile FILE"
        )
        return
    rate = sum(len(request.tokens) for request in requests) / found.sample_s
    source = "estimated, not measured" if found.profile.is_estimated else f"measured {found.profile.date}"
    where = f"{config.gpus} x {found.profile.gpu}" if config.gpus else found.profile.gpu
    console.print(
        f"time: about {duration(found.sample_s * share)} at {rate:,.0f} tokens/s ({where}, {source}); "
        "sharing is counted within the sample; loading weights and waiting for banks are not",
        soft_wrap=True,
    )
