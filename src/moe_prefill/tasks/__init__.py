"""Tasks: what a person asks of a row, as atomic requests, and answers read from their results. Torch-free."""

from .base import Preview, Row, Task
from .build import build_task
from .config import (
    ChooseConfig,
    ClassifyConfig,
    Label,
    RankConfig,
    ScoreConfig,
    SelectConfig,
    TaskConfig,
)
from .taskfile import config_from_mapping, load_task_file, read_task_file

__all__ = [
    "ChooseConfig",
    "ClassifyConfig",
    "Label",
    "Preview",
    "RankConfig",
    "Row",
    "ScoreConfig",
    "SelectConfig",
    "Task",
    "TaskConfig",
    "build_task",
    "config_from_mapping",
    "load_task_file",
    "read_task_file",
]
