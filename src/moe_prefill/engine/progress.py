"""Finished layers, counted in host memory that another process watches. Nothing here waits for the device."""

from __future__ import annotations

import mmap

import torch

from ..core import Int64Array


class LayerCounter:
    """Called after a layer's work is enqueued; ``count`` int64 [1] grows when that work is done.

    On a GPU the counter lives on the device, and every layer ends with a copy of its 8 bytes to the host, in the order
    of the compute stream. ``count`` lies at the start of a page, or in one that no other memory shares: it is pinned.
    """

    def __init__(self, count: Int64Array, device: torch.device) -> None:
        self._host = torch.from_numpy(count)
        self._device_count = None if device.type == "cpu" else torch.zeros(1, dtype=torch.int64, device=device)
        if self._device_count is not None:
            page = self._host.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(runtime.cudaHostRegister(page, mmap.PAGESIZE, 0))

    def __call__(self) -> None:
        if self._device_count is None:
            self._host += 1
        else:
            self._device_count += 1
            self._host.copy_(self._device_count, non_blocking=True)
