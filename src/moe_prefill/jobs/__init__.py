"""Jobs: a task over a table, window by window, resumable; free of torch."""

from .answers import added_columns
from .compare import Metrics, RankMetrics, SetMetrics, metrics_of
from .config import JobConfig
from .counts import Counts
from .fingerprint import model_fingerprint
from .manifest import Identity, known_identity
from .merge import merge_shards
from .metrics import ClassScore, LabelMetrics
from .output import FileOutput, Output, StreamOutput, sidecar_path
from .runner import Observer, Silent, check_columns, finished_summary, run_job
from .summary import Summary
from .windows import Shard, Window, WindowSize, cut_windows

__all__ = [
    "ClassScore",
    "Counts",
    "FileOutput",
    "Identity",
    "JobConfig",
    "LabelMetrics",
    "Metrics",
    "Observer",
    "Output",
    "RankMetrics",
    "SetMetrics",
    "Shard",
    "Silent",
    "StreamOutput",
    "Summary",
    "Window",
    "WindowSize",
    "added_columns",
    "check_columns",
    "cut_windows",
    "finished_summary",
    "known_identity",
    "merge_shards",
    "metrics_of",
    "model_fingerprint",
    "run_job",
    "sidecar_path",
]
