"""From a task's config to a task that is checked against a tokenizer, the engine's limits and a table's columns."""

from __future__ import annotations

from collections.abc import Sequence

from ..core import EngineLimits
from ..errors import TaskError
from ..text import Tokenizer
from .base import Task
from .candidates import RankTask, SelectTask
from .choose import ChooseTask
from .classify import ClassifyTask
from .config import ChooseConfig, ClassifyConfig, RankConfig, ScoreConfig, SelectConfig, TaskConfig
from .score import ScoreTask
from .teacher import TeacherTask


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
