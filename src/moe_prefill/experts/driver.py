"""The few calls of the CUDA driver that torch does not offer: registering host memory, plain copies between any two
pointers, memory that other processes can open. Each raises PlanError or RuntimeError with the driver's own word.

All act on the context that is current in the calling thread: see ``on``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PlanError
from ..memory import show_bytes


def is_here() -> bool:
    """Whether the package that these calls go through is installed; it comes with torch's wheels for CUDA."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def _driver() -> Any:
    try:
        from cuda.bindings import driver  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise PlanError(
            "streaming expert banks on CUDA needs the package cuda-bindings, which is not installed; "
            "install it, or keep every bank resident"
        ) from error
    return driver


def _call(name: str, *arguments: object) -> Any:
    """What a call returns beside its status; RuntimeError with the name of any other status than success."""
    status, *results = getattr(_driver(), name)(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{name} failed: {status.name}")
    return results[0] if results else None


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Make torch's context of a device current, in a thread that has not used torch there yet too."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        _call("cuCtxSetCurrent", _context(device.index))
        yield


@functools.cache
def _context(index: int) -> Any:
    """The one context of a device that torch uses; kept until the process ends."""
    return _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", index))


def register_host(pointer: int, num_bytes: int) -> None:
    """Pin ordinary host memory in place, so that copies from it are asynchronous and run at the link's speed."""
    try:
        _call("cuMemHostRegister", pointer, num_bytes, 0)
    except RuntimeError as error:
        raise PlanError(
            f"{show_bytes(num_bytes)} of host memory cannot be pinned ({error}); keep more banks resident, or "
            "raise the limit of locked memory (ulimit -l) and of the container's memory"
        ) from error


def unregister_host(pointer: int) -> None:
    _call("cuMemHostUnregister", pointer)


def copy_async(target: int, source: int, num_bytes: int, stream: int) -> None:
    _call("cuMemcpyAsync", target, source, num_bytes, stream)


def write_value(pointer: int, value: int, stream: int) -> None:
    """Write an int32 when the stream gets here; its memory is this device's."""
    _call("cuStreamWriteValue32", stream, pointer, value, 0)


def wait_value(pointer: int, value: int, stream: int) -> None:
    """Hold the stream until the int32 is at least ``value`` (0: compare with >=); its memory is this device's."""
    _call("cuStreamWaitValue32", stream, pointer, value, 0)


def allocate(num_bytes: int) -> int:
    """Device memory outside torch's allocator, whose blocks cannot be exported one by one; RuntimeError where there is
    too little.
    """
    return int(_call("cuMemAlloc", num_bytes))


def free(pointer: int) -> None:
    """Give memory back once all work on it is done."""
    _call("cuMemFree", pointer)


def zero(pointer: int, num_bytes: int) -> None:
    """Set bytes to zero; they are when this returns."""
    _call("cuMemsetD8", pointer, 0, num_bytes)
    _call("cuCtxSynchronize")


_HANDLE_BYTES = 64


def export(pointer: int) -> bytes:
    """A handle by which another process on this host can open an allocation."""
    return ctypes.string_at(_call("cuIpcGetMemHandle", pointer).getPtr(), _HANDLE_BYTES)


def open_exported(handle: bytes) -> int:
    """Map another process's allocation here; peer access is enabled with it where it lies on another device."""
    assert len(handle) == _HANDLE_BYTES, len(handle)
    driver = _driver()
    record = driver.CUipcMemHandle()
    ctypes.memmove(record.getPtr(), handle, _HANDLE_BYTES)
    flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    return int(_call("cuIpcOpenMemHandle", record, int(flag)))


def close_exported(pointer: int) -> None:
    _call("cuIpcCloseMemHandle", pointer)


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """Bytes at a device pointer. Of a peer's memory there is no tensor: torch would set up that device in here."""

    pointer: int
    length: int

    def data_ptr(self) -> int:
        return self.pointer

    def numel(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> DeviceBytes:
        first, last, _ = part.indices(self.length)
        return DeviceBytes(self.pointer + first, max(0, last - first))


class Exchanged:
    """Bytes at a device pointer in the form in which array libraries exchange them."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.pointer, self.num_bytes = pointer, num_bytes
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def tensor_over(memory: Exchanged, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] over device memory, no copy. ``memory`` lives as long as any view of the tensor."""
    tensor = torch.as_tensor(memory, device=device)
    assert tensor.data_ptr() == memory.pointer, "the memory was copied: it lies on another device"
    return tensor
