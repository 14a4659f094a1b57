"""From a task's config to a task that is checked against a tokenizer, the engine's limits and a table's columns."""

from __future__ import annotations

from collections.abc import Sequence

from moe_prefill.core import EngineLimits
from moe_prefill.tasks.base import Task
from moe_prefill.tasks.config import TaskConfig
from moe_prefill.text import Tokenizer


def build_task(
    config: TaskConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
) -> Task:
    """Make the task that ``config`` describes.

    ``columns`` are the table's columns, or None where they are not known yet. Raises TaskError, before any work, for
    unknown placeholders, labels that clash, output columns that exist already and too many options.
    """
    raise NotImplementedError
