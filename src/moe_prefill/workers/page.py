"""A page of memory shared with the workers, in which each counts the layers that it has finished."""

from __future__ import annotations

import mmap
import os

import numpy as np

from ..core import Int64Array

_LINE = 8  # int64 a rank: a cache line each


class ProgressPage:
    """``counts`` int64 [ranks]: layers finished by each rank since it started. It is anonymous memory behind ``fd``, so
    nothing of it can outlive the processes.
    """

    def __init__(self, fd: int, num_ranks: int) -> None:
        self.fd = fd
        size = -(-num_ranks * _LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        self._map = mmap.mmap(fd, size)
        self.counts: Int64Array = np.frombuffer(self._map, np.int64)[::_LINE][:num_ranks]

    @classmethod
    def create(cls, num_ranks: int) -> ProgressPage:
        return cls(os.memfd_create("moe-prefill-progress"), num_ranks)

    def read(self) -> list[int]:
        return [int(count) for count in self.counts]

    def close(self) -> None:
        """Give the memory back; nobody else may hold ``counts``."""
        self.counts = np.empty(0, np.int64)
        self._map.close()
        os.close(self.fd)
