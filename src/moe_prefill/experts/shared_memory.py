"""Memory that the other ranks of this host can read and write, and theirs.

On a CPU a block is an anonymous file in memory, opened by the others through the exporter's process; it needs no name
and cannot outlive its users. On CUDA it is an allocation of its own (torch's allocator hands out parts of larger ones),
opened through the driver's inter-process handles: plain peer memory, between two GPUs or two processes on one.
"""

from __future__ import annotations

import json
import mmap
import os
from typing import Protocol

import torch

from ..errors import PlanError, WorkerError
from . import device_memory, driver
from .lanes import Bytes
from .ranks import Ranks


class SharedBlock:
    """A block of this rank (``mine``, uint8 [num_bytes]) and one of every rank of the group, ``of[rank]``, which may
    differ in size. All ranks make it under the same name, and close it.
    """

    def __init__(self, name: str, num_bytes: int, device: torch.device, ranks: Ranks) -> None:
        self._name = name
        self._ranks = ranks
        self._memory: _Memory = _CudaMemory(device) if device.type == "cuda" else _HostMemory()
        self.mine = self._memory.allocate(num_bytes)
        handles = ranks.exchange(f"{name}/handle", self._memory.handle())
        self.of: list[Bytes] = [
            self.mine if rank == ranks.rank else self._memory.open(handle, rank) for rank, handle in enumerate(handles)
        ]
        ranks.meet(f"{name}/opened")

    def close(self, *, wait: bool = True) -> None:
        """Let go of the others' blocks, wait until they let go of ours, free it.

        Without ``wait``, for a group that has lost a rank, our block is left to the end of this process instead.
        """
        self.of = []
        self._memory.close_others()
        if wait:
            self._ranks.meet(f"{self._name}/closed")
            del self.mine
            self._memory.free()


class _Memory(Protocol):
    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Zeros, uint8 [num_bytes]."""
        ...

    def handle(self) -> bytes: ...
    def open(self, handle: bytes, rank: int) -> Bytes: ...
    def close_others(self) -> None: ...
    def free(self) -> None: ...


class _HostMemory:
    def __init__(self) -> None:
        self._file = os.memfd_create("moe-prefill-banks")
        self._num_bytes = 0

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._num_bytes = num_bytes
        os.ftruncate(self._file, max(num_bytes, 1))
        return _mapped(self._file, num_bytes)

    def handle(self) -> bytes:
        return json.dumps([os.getpid(), self._file, self._num_bytes]).encode()

    def open(self, handle: bytes, rank: int) -> torch.Tensor:
        process, number, num_bytes = json.loads(handle)
        try:
            file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
        except OSError as error:
            raise WorkerError(f"the memory of rank {rank} (process {process}) cannot be opened: {error}") from error
        try:
            return _mapped(file, num_bytes)
        finally:
            os.close(file)  # the mapping stays

    def close_others(self) -> None:
        pass  # mappings go with their tensors

    def free(self) -> None:
        os.close(self._file)


def _mapped(file: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, max(num_bytes, 1)), dtype=torch.uint8)[:num_bytes]


class _CudaMemory:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pointer = self._num_bytes = 0
        self._opened: list[int] = []

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._num_bytes, some = num_bytes, max(num_bytes, 1)
        self._pointer = device_memory.allocate(some, self._device)
        with driver.on(self._device):
            driver.zero(self._pointer, some)
        return driver.tensor_over(driver.Exchanged(self._pointer, some), self._device)[:num_bytes]

    def handle(self) -> bytes:
        with driver.on(self._device):
            exported = driver.export(self._pointer)
        return json.dumps([_uuid(self._device), exported.hex(), self._num_bytes]).encode()

    def open(self, handle: bytes, rank: int) -> driver.DeviceBytes:
        uuid, exported, num_bytes = json.loads(handle)
        self._check_access(uuid, rank)
        with driver.on(self._device):
            pointer = driver.open_exported(bytes.fromhex(exported))
        self._opened.append(pointer)
        return driver.DeviceBytes(pointer, num_bytes)

    def close_others(self) -> None:
        with driver.on(self._device):
            for pointer in self._opened:
                driver.close_exported(pointer)
        self._opened.clear()

    def free(self) -> None:
        device_memory.free(self._pointer, max(self._num_bytes, 1), self._device)

    def _check_access(self, uuid: str, rank: int) -> None:
        """PlanError unless this device can read the memory of a peer's."""
        found = [index for index in range(torch.cuda.device_count()) if _uuid(torch.device("cuda", index)) == uuid]
        mine = self._device.index
        if not found or (found[0] != mine and not torch.cuda.can_device_access_peer(mine, found[0])):
            theirs = f"cuda:{found[0]}" if found else f"a GPU that this process does not see ({uuid})"
            raise PlanError(
                f"GPU cuda:{mine} has no peer access to {theirs} of rank {rank}, which pulling banks with copy engines "
                "needs; use GPUs that are connected, or ask for collectives with --transport nccl"
            )


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
