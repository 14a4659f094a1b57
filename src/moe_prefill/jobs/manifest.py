"""The identity of a job: everything that its answers depend on. A resumed job refuses to go on with another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import ScoringEngine
from ..errors import OutputError
from .answers import added_columns
from .config import JobConfig
from .tables import Table
from .windows import MAX_WINDOW_ROWS, Window, WindowSize

if TYPE_CHECKING:
    from ..tasks import Task

FORMAT_VERSION = 2  # of parts, journal and manifest
Identity = dict[str, object]  # flat; values as JSON has them
_DIGESTS = {
    "input.content": " (the rows)",
    "task.digest": " (the template, the labels or another setting of the task; the tokenizer)",
    "engine.plan": " (device, precision, threads, GPUs of a --strategy, sharing, sizes, version of torch)",
    "model.weights": " (the model's files)",
    "model.tokenizer": " (the tokenizer's files)",
}


def known_identity(
    table: Table, task: Task, config: JobConfig, model: Mapping[str, str], settings: Mapping[str, object]
) -> Identity:
    """What a job's output depends on, as far as it is known before the engine is built. ``model`` names the model and
    its tokenizer by content, ``settings`` are the engine's.
    """
    names = [path.name for path in table.files]
    return {
        "version": FORMAT_VERSION,
        "input.format": table.format,
        "input.files": names
        if len(names) <= 8
        else [len(names), hashlib.sha256(json.dumps(names).encode()).hexdigest()],
        "input.rows": table.num_rows,
        "input.bytes": table.num_bytes,
        "input.content": table.digest,
        "task.kind": task.name,
        "task.digest": task.digest,
        "task.chat_date": config.chat_date,
        **{f"engine.{name}": value for name, value in settings.items()},
        **{f"model.{name}": value for name, value in model.items()},
        "output.format": config.output_format,
        "output.columns": [f"{column.name}: {column.kind}" for column in added_columns(task, config.prefix)],
        "shard": str(config.shard),
        "label_column": config.label_column,
        "windows.rows": config.window_rows or MAX_WINDOW_ROWS,
    }


def planned_identity(engine: ScoringEngine, size: WindowSize, windows: Sequence[Window]) -> Identity:
    """The rest, which the engine's plan decides."""
    return {
        "engine.plan": engine.plan_digest,
        "engine.max_sweep_tokens": engine.limits.max_sweep_tokens,
        "engine.chunk_rows": engine.limits.chunk_rows,
        "windows.bytes": size.num_bytes,
        "windows.count": len(windows),
    }


def check_same_job(where: Path, recorded: Mapping[str, object], asked: Identity) -> None:
    """Raise OutputError with every field that differs and both values."""
    differing = [name for name in {**recorded, **asked} if recorded.get(name) != asked.get(name)]
    if differing:
        lines = [
            f"  {name}: {_short(recorded.get(name))} there, {_short(asked.get(name))} now{_DIGESTS.get(name, '')}"
            for name in differing
        ]
        raise OutputError(
            "\n".join([f"{where} belongs to another job, so it cannot be resumed:", *lines])
            + "\nGive the same model, input and task again, or start over with --overwrite"
        )


def read_json(path: Path) -> dict[str, object]:
    """Read one of our own JSON files. Raises OutputError when it is damaged or of another version."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); start over with --overwrite") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise OutputError(
            f"{path}: format version {version}, this program writes {FORMAT_VERSION}; start over with --overwrite"
        )
    assert isinstance(data, dict)
    return data


def json_mapping(record: Mapping[str, object], name: str) -> dict[str, object]:
    """The object under ``name`` in a file that ``read_json`` has read."""
    value = record[name]
    assert isinstance(value, dict), (name, value)
    return value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
