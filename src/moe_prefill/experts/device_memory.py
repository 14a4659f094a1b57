"""Device memory of banks, outside torch's caching allocator.

That allocator keeps what is freed, hands out parts of larger allocations, which other processes cannot open, and mixes
banks of gigabytes, which never change, with activations of all sizes, which come and go.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch

from ..errors import PlanError
from ..memory import show_bytes
from . import driver

_held: Counter[int] = Counter()  # bytes by index of the device


def empty(num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes], freed when its last view is gone; PlanError where the device has too little left.

    On a CPU, and where the driver's package is missing, it is torch's.
    """
    if device.type != "cuda" or not driver.is_here():
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return driver.tensor_over(_Owned(max(num_bytes, 1), device), device)[:num_bytes]


def held_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that are in use here and that torch's own statistics do not count."""
    return _held[device.index]


def allocate(num_bytes: int, device: torch.device) -> int:
    """A pointer to memory of a CUDA device, for who frees it himself; PlanError as ``empty``."""
    with driver.on(device):
        try:
            pointer = driver.allocate(num_bytes)
        except RuntimeError:
            torch.cuda.empty_cache()  # what torch keeps for later is ours first
            pointer = _allocate_or_say(num_bytes, device)
    _held[device.index] += num_bytes
    return pointer


def free(pointer: int, num_bytes: int, device: torch.device) -> None:
    """Give back what ``allocate`` gave, once all work on it is done."""
    with driver.on(device):
        driver.free(pointer)
    _held[device.index] -= num_bytes


class _Owned(driver.Exchanged):
    """An allocation that goes with this object."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        super().__init__(allocate(num_bytes, device), num_bytes)
        self._device = device

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "_device"):  # else the process gives all back, or nothing was had
            free(self.pointer, self.num_bytes, self._device)


def _allocate_or_say(num_bytes: int, device: torch.device) -> int:
    try:
        return driver.allocate(num_bytes)
    except RuntimeError as error:
        left, total = torch.cuda.mem_get_info(device)
        raise PlanError(
            f"{show_bytes(num_bytes)} for expert banks cannot be had on {device} ({error}): {show_bytes(left)} of "
            f"{show_bytes(total)} are free; end what else uses this GPU, or lower --hbm-gib"
        ) from error
