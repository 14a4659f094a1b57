"""Task files (TOML) and option mappings to typed configs; an unknown key is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_prefill.tasks.config import TaskConfig


def read_task_file(path: str | Path) -> tuple[str, dict[str, object]]:
    """Read a task file: its kind (key ``task``) and its other keys as they stand. Raises TaskError."""
    raise NotImplementedError


def config_from_mapping(kind: str, values: Mapping[str, object], source: str = "options") -> TaskConfig:
    """Build the config of task ``kind`` from plain values (strings, numbers, booleans, lists, label tables).

    ``source`` is named in messages. Raises TaskError for an unknown kind or key, or a value of a wrong type.
    """
    raise NotImplementedError


def load_task_file(path: str | Path) -> TaskConfig:
    """``read_task_file`` and ``config_from_mapping`` in one."""
    raise NotImplementedError
