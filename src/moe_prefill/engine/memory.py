"""How much memory a device and the host have for us."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..config import EngineConfig
from ..errors import UsageError
from ..experts import device_memory
from ..memory import GIB

_CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
_NO_LIMIT = 1 << 60  # version 1 writes a number like this where there is none
_GROWING = (Path("/sys/bus/virtio/drivers/virtio_balloon"), Path("/sys/bus/virtio/drivers/virtio_mem"))


def free_bytes(device: torch.device, limit_gib: float | None) -> int:
    """Bytes that new allocations may take on ``device``, at most ``limit_gib``."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = available_host_bytes() // 2  # the other half is the system's and the tables'
    return free if limit_gib is None else min(free, int(limit_gib * GIB))


def peak_bytes(device: torch.device) -> int:
    """Most bytes of a CUDA device that this process had in use at once: torch's, and banks, which stay."""
    return torch.cuda.max_memory_allocated(device) + device_memory.held_bytes(device)


def host_pool_bytes(limit_gib: float | None) -> int:
    """Bytes of host memory that all ranks together may pin: the setting, or what is free now. UsageError when the
    setting is more than the host has.
    """
    if limit_gib is None:
        return available_host_bytes()
    check_host_gib(limit_gib)
    return int(limit_gib * GIB)


def cpu_limit_gib(config: EngineConfig) -> float | None:
    """What the settings allow on a CPU, where both kinds of memory are the host's. UsageError as above."""
    if config.host_gib is None:
        return config.memory_gib
    check_host_gib(config.host_gib)
    return config.host_gib


def check_host_gib(limit_gib: float) -> None:
    """Raise UsageError for a setting that is more than the host has."""
    total = total_host_bytes()
    if total is not None and limit_gib * GIB > total:
        said = f"is {limit_gib:g}, and this host has {total / GIB:.1f} GiB of memory; give at most that"
        raise UsageError.about("host_gib", said)


def available_host_bytes() -> int:
    """Memory that is free or can be freed now, within the limit of the control group."""
    limit, used = _cgroup("memory.max", "memory.limit_in_bytes"), _cgroup("memory.current", "memory.usage_in_bytes")
    free = _meminfo("MemAvailable")
    return free if limit is None else max(0, min(free, limit - (used or 0)))


def total_host_bytes() -> int | None:
    """All memory of this host or control group; None where it grows on use, as under a hypervisor that lends memory
    by need: then nothing in the machine says how much there is.
    """
    limit, total = _cgroup("memory.max", "memory.limit_in_bytes"), _meminfo("MemTotal")
    if limit is not None and limit < total:
        return limit
    grows = any(any(driver.glob("virtio*")) for driver in _GROWING if driver.is_dir())
    return limit if grows else total


def _cgroup(*names: str) -> int | None:
    """A number of the control group, whichever version it has; None: not there, or no limit."""
    for folder in _CGROUPS:
        for name in names:
            try:
                number = int((folder / name).read_text())
            except (OSError, ValueError):
                continue
            return None if number >= _NO_LIMIT else number
    return None


def _meminfo(field: str) -> int:
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields[field].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
