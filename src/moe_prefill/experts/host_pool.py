"""Host memory for banks, pinned where the device is CUDA.

One anonymous mapping, first touched by many threads, then pinned in place bank by bank. torch's own pinned allocator
would round each bank up to a power of two.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from ..errors import PlanError
from ..memory import show_bytes
from . import driver

_PAGE = mmap.PAGESIZE
_TOUCH_BYTES = 256 << 20  # a thread's portion


class HostPool:
    """uint8 tensors of given sizes in host memory, each at a page's start, by layer.

    How much there may be is the residency plan's business. PlanError where the system does not map or pin it all the
    same.
    """

    def __init__(self, sizes: Mapping[int, int], device: torch.device) -> None:
        total = sum(_paged(size) for size in sizes.values())
        self._device = device
        self._pinned: list[int] = []
        self._banks = {layer: torch.empty(0, dtype=torch.uint8) for layer in sizes}
        if not total:
            return  # no layers, or a rank that has no experts: there are more ranks
        try:
            mapping = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise PlanError(f"the system does not give {show_bytes(total)} of host memory for expert banks") from error
        memory = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping alive
        _touch(memory)
        offset = 0
        for layer, size in sizes.items():
            self._banks[layer] = memory[offset : offset + size]
            offset += _paged(size)
        if device.type == "cuda":
            self._pin()

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._banks[layer]

    def close(self) -> None:
        """Unpin and let go; no copy from here is under way any more."""
        if self._pinned:
            with driver.on(self._device):
                for pointer in self._pinned:
                    driver.unregister_host(pointer)
        self._pinned.clear()
        self._banks.clear()

    def _pin(self) -> None:
        with driver.on(self._device):
            for bank in self._banks.values():
                if bank.numel():
                    driver.register_host(bank.data_ptr(), _paged(bank.numel()))
                    self._pinned.append(bank.data_ptr())


def _touch(memory: torch.Tensor) -> None:
    """Make the system provide every page, on as many threads as help: faulting is most of the cost of pinning."""
    pages = memory.numpy()[::_PAGE]

    def touch(first: int) -> None:
        pages[first : first + step] = 0

    step = _TOUCH_BYTES // _PAGE
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as threads:
        list(threads.map(touch, range(0, len(pages), step)))


def _paged(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
