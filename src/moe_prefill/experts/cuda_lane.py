"""A lane on CUDA: a side stream. Nothing here makes the host wait."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import driver
from .lanes import DEFAULT_SLICE_BYTES, Bytes, Mark, slices


class CudaMark:
    """An event with a time, recorded on the stream that is current or given."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def is_done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def ms_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, CudaMark)
        return float(earlier.event.elapsed_time(self.event))


class CudaLane:
    """Implements ``Lane``; the compute side is the current stream of the calling thread.

    Copies are plain asynchronous memory copies between any two pointers that the driver knows (pinned host memory, this
    device's memory, a peer's): the copy engines do them, and no multiprocessor takes part.
    """

    def __init__(self, device: torch.device, slice_bytes: int = DEFAULT_SLICE_BYTES) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.slice_bytes = slice_bytes
        self._posted = torch.empty(1, dtype=torch.int32, device=device)

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def copy(self, target: Bytes, source: Bytes) -> None:
        with torch.cuda.device(self.device):
            for to, of in slices(target, source, self.slice_bytes):
                driver.copy_async(to.data_ptr(), of.data_ptr(), to.numel(), self.stream.cuda_stream)

    def mark(self) -> CudaMark:
        return CudaMark(self.stream)

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        self.stream.wait_event(mark.event)

    def post(self, flag: Bytes, value: int) -> None:
        with torch.cuda.device(self.device):
            driver.write_value(self._posted.data_ptr(), value, self.stream.cuda_stream)
            driver.copy_async(flag.data_ptr(), self._posted.data_ptr(), flag.numel(), self.stream.cuda_stream)

    def await_value(self, flag: Bytes, value: int, timeout_s: float) -> None:
        with torch.cuda.device(self.device):
            driver.wait_value(flag.data_ptr(), value, self.stream.cuda_stream)

    def compute_mark(self) -> CudaMark:
        return CudaMark(torch.cuda.current_stream(self.device))

    def compute_wait(self, mark: Mark) -> tuple[CudaMark, CudaMark]:
        assert isinstance(mark, CudaMark)
        begin = self.compute_mark()
        torch.cuda.current_stream(self.device).wait_event(mark.event)
        return begin, self.compute_mark()

    def close(self) -> None:
        self.stream.synchronize()


def write_past_streams(flags: torch.Tensor, value: int) -> None:
    """Set int32 flags on a stream of its own, of high priority so that it shares no queue with one that waits."""
    with driver.on(flags.device):
        stream = torch.cuda.Stream(flags.device, priority=-1)  # type: ignore[no-untyped-call]
        for index in range(flags.numel()):
            driver.write_value(flags[index].data_ptr(), value, stream.cuda_stream)
