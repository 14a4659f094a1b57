"""A lane on the CPU: one thread that does what it is given in order."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable

import torch

from ..errors import WorkerError
from .lanes import DEFAULT_SLICE_BYTES, Bytes, Mark, slices


class ThreadMark:
    """Set once, with the time and with what went wrong before it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: Exception | None = None
        self._at_s = 0.0

    def set(self, error: Exception | None = None) -> ThreadMark:
        self._at_s, self._error = time.perf_counter(), error
        self._event.set()
        return self

    def wait(self) -> None:
        self._event.wait()
        if self._error is not None:
            raise self._error

    def is_done(self) -> bool:
        return self._event.is_set()

    def ms_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, ThreadMark)
        assert self.is_done()
        assert earlier.is_done()
        return 1e3 * (self._at_s - earlier._at_s)


class ThreadLane:
    """Implements ``Lane``. After the first error nothing more is done, and every later mark carries that error."""

    def __init__(self, slice_bytes: int = DEFAULT_SLICE_BYTES) -> None:
        self.slice_bytes = slice_bytes
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="lane", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], object]) -> None:
        self._queue.put(lambda: self._attempt(work))

    def copy(self, target: Bytes, source: Bytes) -> None:
        for to, of in slices(target, source, self.slice_bytes):
            assert isinstance(to, torch.Tensor)
            assert isinstance(of, torch.Tensor)
            self.run(functools.partial(to.copy_, of))

    def mark(self) -> ThreadMark:
        mark = ThreadMark()
        self._queue.put(lambda: mark.set(self._error))
        return mark

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, ThreadMark)
        self.run(mark.wait)

    def post(self, flag: Bytes, value: int) -> None:
        self.run(lambda: _int32(flag).fill_(value))

    def await_value(self, flag: Bytes, value: int, timeout_s: float) -> None:
        self.run(lambda: _poll(_int32(flag), value, timeout_s))

    def compute_mark(self) -> ThreadMark:
        return ThreadMark().set()  # the compute side is the calling thread: what it was given is done

    def compute_wait(self, mark: Mark) -> tuple[ThreadMark, ThreadMark]:
        assert isinstance(mark, ThreadMark)
        begin = self.compute_mark()
        mark.wait()
        return begin, self.compute_mark()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work()

    def _attempt(self, work: Callable[[], object]) -> None:
        if self._error is not None:
            return
        try:
            work()
        except Exception as error:  # it belongs to the thread that waits for this lane's marks
            self._error = error


def _int32(flag: Bytes) -> torch.Tensor:
    assert isinstance(flag, torch.Tensor)
    return flag.view(torch.int32)


def _poll(flag: torch.Tensor, value: int, timeout_s: float) -> None:
    """Sleep until the flag, which another process writes, is at least ``value``."""
    deadline, pause_s = time.monotonic() + timeout_s, 2e-5
    while int(flag) < value:
        if time.monotonic() > deadline:
            raise WorkerError(f"another rank has not brought its part of an expert bank in {timeout_s:g} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1e-3)
