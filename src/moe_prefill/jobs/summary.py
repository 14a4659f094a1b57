"""What a job did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core import RunStats
from .compare import Metrics
from .counts import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """``counts`` cover the whole output; times, rates and tokens this run only."""

    output: str
    counts: Counts
    metrics: Metrics | None = None
    resumed_rows: int = 0  # finished by earlier runs of the job
    seconds: float = 0.0
    stats: RunStats
    peak_flops: float | None = None

    @property
    def new_rows(self) -> int:
        return self.counts.rows - self.resumed_rows

    def to_json(self) -> dict[str, object]:
        return {
            "output": self.output,
            "rows": self.counts.rows,
            "resumed_rows": self.resumed_rows,
            "errors": dict(sorted(self.counts.errors.items())),
            "notes": dict(sorted(self.counts.notes.items())),
            "seconds": round(self.seconds, 3),
            **rates(self.stats, self.new_rows, self.seconds, self.peak_flops),
            "metrics": self.metrics.to_json() if self.metrics else None,
        }


def rates(stats: RunStats, rows: int, seconds: float, peak_flops: float | None) -> dict[str, object]:
    """Rates of a run or of a part of it. ``mfu`` divides by the time that the engine was busy; None: peak not known."""
    mfu = stats.flops / stats.busy_s / peak_flops if peak_flops and stats.busy_s > 0 else None
    return {
        "sweeps": stats.sweeps,
        "requests": stats.requests,
        "prompt_tokens": stats.prompt_tokens,
        "computed_tokens": stats.computed_tokens,
        "saved_prefix_tokens": round(stats.saved_tokens / stats.prompt_tokens, 4) if stats.prompt_tokens else 0.0,
        "rows_per_s": round(rows / seconds, 2) if seconds > 0 else 0.0,
        "tokens_per_s": round(stats.prompt_tokens / seconds, 1) if seconds > 0 else 0.0,
        "engine_busy_s": round(stats.busy_s, 3),
        "mfu": round(mfu, 4) if mfu is not None else None,
        "worker_restarts": stats.restarts,
        "recovery_s": round(stats.recovery_s, 3),
    }


def snapshot(stats: RunStats) -> RunStats:
    """A copy of the engine's counters, which go on counting."""
    return replace(stats)


def since(stats: RunStats, start: RunStats) -> RunStats:
    """What was done after ``start``."""
    return stats - start
