"""From a task's config to a task that is checked against a tokenizer, the engine's limits and a table's columns."""

from __future__ import annotations

from collections.abc import Sequence

from moe_prefill.core import EngineLimits
from moe_prefill.errors import TaskError
from moe_prefill.tasks.base import Task
from moe_prefill.tasks.candidates import RankTask, SelectTask
from moe_prefill.tasks.choose import ChooseTask
from moe_prefill.tasks.classify import ClassifyTask
from moe_prefill.tasks.config import ChooseConfig, ClassifyConfig, RankConfig, ScoreConfig, SelectConfig, TaskConfig
from moe_prefill.tasks.score import ScoreTask
from moe_prefill.tasks.teacher import TeacherTask
from moe_prefill.text import Tokenizer


def build_task(
    config: TaskConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
) -> Task:
    """Make the task that ``config`` describes.

    ``columns`` are the table's columns, or None where they are not known yet. Raises TaskError, before any work, for
    unknown placeholders, labels that clash, output columns that exist already and too many options.
    """
    match config:
        case ClassifyConfig():
            return ClassifyTask(config, tokenizer, limits, columns)
        case ChooseConfig():
            return ChooseTask(config, tokenizer, limits, columns)
        case SelectConfig():
            return SelectTask(config, tokenizer, limits, columns)
        case RankConfig():
            return RankTask(config, tokenizer, limits, columns)
        case ScoreConfig(token_ids_column=None):
            return ScoreTask(config, tokenizer, limits, columns)
        case ScoreConfig():
            return TeacherTask(config, tokenizer, limits, columns)
    raise TaskError(f"{type(config).__name__} is not the config of a task")
