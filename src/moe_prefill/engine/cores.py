"""How the parts of a layer share a CPU: a part a core, where there are parts enough.

Matrix products of a thousand rows leave a second core half idle, since every operation ends with a meeting of all
threads; whole chunks on a core each meet once a layer. A GPU gets its parts one after the other.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

Item = TypeVar("Item")
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt


def cpu_threads(threads: int | None) -> int:
    """Those that are asked for, else as many as this process may use."""
    return threads or len(os.sched_getaffinity(0))


class Cores(Protocol):
    """``each`` calls ``work`` once for every item; items are independent, their order is free."""

    def each(self, work: Callable[[Item], None], items: Sequence[Item]) -> None: ...

    def close(self) -> None: ...


class OneByOne(Cores):
    """In order, on the calling thread."""

    def each(self, work: Callable[[Item], None], items: Sequence[Item]) -> None:
        for item in items:
            work(item)

    def close(self) -> None:
        pass


class ManyCores(Cores):
    """Items run side by side on ``threads`` threads, one core each; fewer than half as many items run one after the
    other on all cores. Which of the two depends on numbers alone, so results repeat.
    """

    def __init__(self, threads: int) -> None:
        assert threads > 1, threads
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "core", initializer=torch.set_num_threads, initargs=(1,))

    def each(self, work: Callable[[Item], None], items: Sequence[Item]) -> None:
        if 2 * len(items) <= self._threads or len(items) == 1:
            for item in items:
                work(item)
            return
        inference = torch.is_inference_mode_enabled()

        def alone(item: Item) -> None:
            with torch.inference_mode(inference):  # a setting of each thread
                work(item)

        torch.set_num_threads(1)
        try:
            list(self._pool.map(alone, items))
        finally:
            torch.set_num_threads(self._threads)

    def close(self) -> None:
        self._pool.shutdown()


ONE_BY_ONE = OneByOne()


def cores_of(device: torch.device, threads: int) -> Cores:
    """What suits a device: ``threads`` are those of a CPU."""
    return ManyCores(threads) if device.type == "cpu" and threads > 1 else ONE_BY_ONE


def keep_freed_memory() -> None:
    """Let glibc keep what activations free, up to a gigabyte, instead of handing it back at once: the next operation
    wants it again, and would fault every page in anew. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, num_bytes in ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, 1 << 30), (_TOP_PAD, 64 << 20)):
            mallopt(option, num_bytes)
