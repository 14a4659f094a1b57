"""Progress on standard error while a job runs: a live line for people, JSON lines for programs."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..core import ScoringEngine
from ..jobs import Counts, Observer, Silent, Window
from ..jobs.answers import Group
from ..jobs.summary import rates, since, snapshot
from .flags import RunOptions

_REFRESH_S = 0.5


class Meter:
    """An observer that knows how far the job is, also inside a window: by the requests that the engine has answered."""

    def started(self, total_rows: int, resumed_rows: int, engine: ScoringEngine) -> None:
        self.total_rows, self._resumed, self._engine = total_rows, resumed_rows, engine
        self._rows = resumed_rows  # in finished windows
        self._errors = 0
        self._group_rows, self._window_rows = 0, 0
        self._group_requests, self._requests_before = 1, 0
        self._start_s, self._start = time.monotonic(), snapshot(engine.stats)

    def scoring(self, group: Group, num_requests: int) -> None:
        self._window_rows += self._group_rows
        self._group_rows = len(group.prepared)
        self._group_requests, self._requests_before = max(1, num_requests), self._engine.stats.requests

    def finished(self, window: Window, counts: Counts) -> None:
        self._rows += counts.rows
        self._errors += counts.num_errors
        self._group_rows, self._window_rows = 0, 0

    def now(self) -> dict[str, object]:
        """How far and how fast, as numbers."""
        share = min(1.0, (self._engine.stats.requests - self._requests_before) / self._group_requests)
        rows = self._rows + self._window_rows + share * self._group_rows
        seconds = time.monotonic() - self._start_s
        new = rows - self._resumed
        left = (self.total_rows - rows) * seconds / new if new > 0 else None
        return {
            "rows": int(rows),
            "total_rows": self.total_rows,
            "errors": self._errors,
            "seconds_left": round(left, 1) if left is not None else None,
            **rates(since(self._engine.stats, self._start), int(new), seconds, self._engine.peak_flops),
        }


class JsonMeter(Meter):
    """A JSON line after every window."""

    def finished(self, window: Window, counts: Counts) -> None:
        super().finished(window, counts)
        print(json.dumps({"event": "progress", **self.now()}), file=sys.stderr, flush=True)


class LiveMeter(Meter):
    """A live line on a terminal, refreshed also while a window is computed."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="progress", daemon=True)

    def started(self, total_rows: int, resumed_rows: int, engine: ScoringEngine) -> None:
        super().started(total_rows, resumed_rows, engine)
        self._task = self._progress.add_task("", total=total_rows, completed=resumed_rows, facts="")
        self._thread.start()

    def stop(self) -> None:
        """Show the last state and end the thread."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
            self._show()

    def _refresh(self) -> None:
        while not self._stop.wait(_REFRESH_S):
            self._show()

    def _show(self) -> None:
        now = self.now()
        self._progress.update(self._task, completed=int(str(now["rows"])), facts=facts_line(now))


def facts_line(now: dict[str, object]) -> str:
    """The rates of a moment in words."""
    parts = [f"{now['rows_per_s']:,} rows/s", f"{now['tokens_per_s']:,.0f} tokens/s"]
    if now["saved_prefix_tokens"]:
        parts.append(f"{now['saved_prefix_tokens']:.0%} saved by sharing")
    if now["mfu"] is not None:
        parts.append(f"MFU {now['mfu']:.1%}")
    if now["errors"]:
        parts.append(f"{now['errors']:,} errors")
    left = now["seconds_left"]
    if isinstance(left, float):
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m 20s, 2h 5m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s"
    return f"{whole // 3600:,}h {whole % 3600 // 60}m"


@contextmanager
def observer_for(run: RunOptions) -> Iterator[Observer]:
    """The observer that the options ask for."""
    if run.json and not run.quiet:
        yield JsonMeter()
    elif run.quiet or not sys.stderr.isatty():
        yield Silent()
    else:
        columns = (
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,} rows"),
            TextColumn("{task.fields[facts]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            meter = LiveMeter(progress)
            try:
                yield meter
            finally:
                meter.stop()
