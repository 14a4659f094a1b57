"""Lanes: work done in order beside the computation, with marks that either side can wait for.

A mark stands for everything enqueued before it. The compute side waits for a lane's marks (a bank is ready) and a lane
for marks of the compute side (a buffer is no longer read); on CUDA neither wait ever involves the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

DEFAULT_SLICE_BYTES = 64 << 20  # of a copy: 0.2 ms at 400 GB/s, so that starting the next one does not count


class Mark(Protocol):
    def is_done(self) -> bool: ...

    def ms_since(self, earlier: Mark) -> float:
        """Milliseconds between two marks of one kind of lane, both done."""
        ...


class Bytes(Protocol):
    """A run of bytes that a lane can copy: a uint8 tensor, or memory of another device that is no tensor here."""

    def numel(self) -> int: ...
    def data_ptr(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Bytes: ...


class Lane(Protocol):
    @property
    def slice_bytes(self) -> int:
        """How much a copy moves at a time."""
        ...

    def run(self, work: Callable[[], object]) -> None:
        """Do, or on CUDA enqueue, some work in order."""
        ...

    def copy(self, target: Bytes, source: Bytes) -> None:
        """Copy as many bytes, on whatever devices they are, in slices."""
        ...

    def mark(self) -> Mark:
        """A mark behind everything this lane was given so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """What this lane is given from now on happens after ``mark``."""
        ...

    def post(self, flag: Bytes, value: int) -> None:
        """Write an int32 to 4 bytes, here or on a peer, after everything this lane was given so far."""
        ...

    def await_value(self, flag: Bytes, value: int, timeout_s: float) -> None:
        """What this lane is given from now on happens when the int32 in 4 bytes of this device's memory is at least
        ``value``. Only a lane with a thread knows a timeout (WorkerError at the next wait for its marks).
        """
        ...

    def compute_mark(self) -> Mark:
        """A mark behind everything that the compute side was given so far."""
        ...

    def compute_wait(self, mark: Mark) -> tuple[Mark, Mark]:
        """What the compute side is given from now on happens after ``mark``; marks around the wait measure it.

        Raises what went wrong on the lane before the mark, where the lane can know it.
        """
        ...

    def close(self) -> None:
        """Finish what was given; the lane is not to be used afterwards."""
        ...


def slices(target: Bytes, source: Bytes, size: int) -> Iterator[tuple[Bytes, Bytes]]:
    """Matching pieces of at most ``size`` bytes."""
    assert target.numel() == source.numel(), (target.numel(), source.numel())
    for first in range(0, target.numel(), size):
        yield target[first : first + size], source[first : first + size]


def write_now(flags: torch.Tensor, value: int) -> None:
    """Set int32 flags of this device's memory past every lane, even one that waits; from any thread."""
    if flags.is_cuda:
        from .cuda_lane import write_past_streams

        write_past_streams(flags, value)
    else:
        flags.fill_(value)


def open_lane(device: torch.device, slice_bytes: int = DEFAULT_SLICE_BYTES) -> Lane:
    """A new lane beside the computation on ``device``."""
    if device.type == "cuda":
        from .cuda_lane import CudaLane

        return CudaLane(device, slice_bytes)
    from .thread_lane import ThreadLane

    return ThreadLane(slice_bytes)
