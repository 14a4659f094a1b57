"""Bandwidth of each transport at the size of a bank, by the copies that expert streams use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..experts import HostPool, open_lane
from .timing import synchronize

_RUNS = 5


def measure_transfers(device: torch.device, bank_bytes: int) -> dict[str, float]:
    """Bytes/s by transport, of those that this machine has.

    ``host``: pinned host memory to the device. ``local``: within the device. With a second GPU whose memory can be
    read, ``copy-engine``: from it, and ``nccl``: what arrives at one of two in an all-gather. On a CPU all memory is
    one, so a peer's is copied as the host's is.
    """
    target = torch.empty(bank_bytes, dtype=torch.uint8, device=device)
    found = {"local": _copy(target, torch.zeros_like(target), device)}
    pool = HostPool({0: bank_bytes}, device)
    try:
        found["host"] = _copy(target, pool[0], device)
    finally:
        pool.close()
    if device.type == "cpu":
        return found | {"copy-engine": found["host"]}
    peer = _readable_peer(device)
    if peer is not None:
        source = torch.zeros(bank_bytes, dtype=torch.uint8, device=peer)
        target.copy_(source)  # torch grants the two access to one another's memory
        found |= {"copy-engine": _copy(target, source, device), "nccl": _all_gather(device, peer, bank_bytes)}
    return found


def _readable_peer(device: torch.device) -> torch.device | None:
    others = (torch.device("cuda", i) for i in range(torch.cuda.device_count()) if i != device.index)
    return next((other for other in others if torch.cuda.can_device_access_peer(device, other)), None)


def _copy(target: torch.Tensor, source: torch.Tensor, device: torch.device) -> float:
    lane = open_lane(device)

    def work() -> None:
        lane.copy(target, source)
        lane.compute_wait(lane.mark())

    rate = target.numel() / _median(work, (device,))
    lane.close()
    return rate


def _all_gather(device: torch.device, peer: torch.device, bank_bytes: int) -> float:
    """Each GPU holds half of a bank and receives the other's."""
    both, half = (device, peer), bank_bytes // 2
    shards = [torch.zeros(half, dtype=torch.uint8, device=each) for each in both]
    banks = [torch.empty(2 * half, dtype=torch.uint8, device=each) for each in both]
    return half / _median(lambda: torch.cuda.nccl.all_gather(shards, banks), both)


def _median(work: Callable[[], object], devices: tuple[torch.device, ...]) -> float:
    """Wall-clock seconds from idle to idle; a bank takes long beside a launch."""
    taken_s = []
    for _ in range(_RUNS + 1):
        for device in devices:
            synchronize(device)
        start = time.perf_counter()
        work()
        for device in devices:
            synchronize(device)
        taken_s.append(time.perf_counter() - start)
    return statistics.median(taken_s[1:])
