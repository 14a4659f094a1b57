"""Tasks: what a person asks of a row, as atomic requests, and answers read from their results. Torch-free."""

from moe_prefill.tasks.base import Preview, Row, Task
from moe_prefill.tasks.build import build_task
from moe_prefill.tasks.config import (
    ChooseConfig,
    ClassifyConfig,
    Label,
    RankConfig,
    ScoreConfig,
    SelectConfig,
    TaskConfig,
)
from moe_prefill.tasks.taskfile import config_from_mapping, load_task_file, read_task_file

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
