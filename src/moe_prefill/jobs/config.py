"""The settings of a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from .tables import Format
from .windows import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """How to run a job. ``window_rows`` None: chosen from the engine's plan. ``prefix`` goes before the error
    column's name; the task prefixes its own columns. ``labels`` are the task's labels where it has fixed ones, for
    the metrics. ``chat_date`` is the day that a chat template sees, recorded so that a resumed job sees the same.
    """

    output_format: Format
    prefix: str = ""
    shard: Shard = field(default_factory=Shard)
    window_rows: int | None = None
    label_column: str | None = None
    chat_date: str | None = None
    labels: tuple[str, ...] | None = None
