"""Fixed windows of the input: what is computed, written and resumed as one piece."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import EngineLimits
from ..errors import UsageError
from .tables import Marks

MAX_WINDOW_ROWS = 8192
_SWEEPS = 8  # of text a window holds: at most one of them is part full, and a killed job loses no more than these
_BYTES_PER_TOKEN = 4  # of English text, about; only the window's size depends on it
_MIN_BYTES, _MAX_BYTES = 256 * 1024, 8 * 1024 * 1024  # the upper bound keeps the memory of two windows small


@dataclass(frozen=True, slots=True)
class Window:
    """Rows ``first_row`` to ``end_row`` of the input; reading starts at granule ``mark``."""

    index: int
    mark: int
    first_row: int
    end_row: int

    @property
    def num_rows(self) -> int:
        return self.end_row - self.first_row


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSize:
    """The largest window, in rows and in bytes of input."""

    rows: int
    num_bytes: int

    @classmethod
    def planned(cls, limits: EngineLimits, rows: int | None = None) -> WindowSize:
        """The size that suits an engine; ``rows`` is what the user asked for."""
        if rows is not None and rows < 1:
            raise UsageError(f"--window-rows is {rows}; it must be at least 1")
        num_bytes = limits.max_sweep_tokens * _SWEEPS * _BYTES_PER_TOKEN
        return cls(rows=rows or MAX_WINDOW_ROWS, num_bytes=min(_MAX_BYTES, max(_MIN_BYTES, num_bytes)))


@dataclass(frozen=True, slots=True)
class Shard:
    """This host's part of a job: number ``index`` (from 1) of ``count``."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``I/N``. Raises UsageError."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UsageError(f"--shard is {text!r}; it must be I/N with I from 1 to N, for example 1/8")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def take(self, windows: list[Window]) -> list[Window]:
        """A contiguous run of windows: the shards' outputs one after another are the whole output."""
        first, end = (len(windows) * i // self.count for i in (self.index - 1, self.index))
        return windows[first:end]


def cut_windows(marks: Marks, size: WindowSize) -> list[Window]:
    """Unite granules into windows, greedily. Depends on nothing but the input and ``size``."""
    windows: list[Window] = []
    start, used = 0, 0
    for index in range(len(marks)):
        rows = marks.end_row(index) - marks.rows[start]
        if index > start and (rows > size.rows or used + marks.sizes[index] > size.num_bytes):
            windows.append(Window(len(windows), start, marks.rows[start], marks.rows[index]))
            start, used = index, 0
        used += marks.sizes[index]
    if len(marks):
        windows.append(Window(len(windows), start, marks.rows[start], marks.num_rows))
    return windows
