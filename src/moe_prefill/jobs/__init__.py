"""Jobs: a task over a table, window by window, resumable; free of torch."""

from .counts import Counts
from .fingerprint import model_fingerprint
from .merge import merge_shards
from .metrics import Metrics, compute_metrics
from .output import FileOutput, Output, StreamOutput, sidecar_path
from .runner import JobConfig, Observer, Silent, check_columns, run_job
from .summary import Summary
from .windows import Shard, Window, WindowSize, cut_windows

__all__ = [
    "Counts",
    "FileOutput",
    "JobConfig",
    "Metrics",
    "Observer",
    "Output",
    "Shard",
    "Silent",
    "StreamOutput",
    "Summary",
    "Window",
    "WindowSize",
    "check_columns",
    "compute_metrics",
    "cut_windows",
    "merge_shards",
    "model_fingerprint",
    "run_job",
    "sidecar_path",
]
