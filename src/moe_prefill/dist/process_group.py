"""Process groups for those who need collectives: the NCCL transport and the baselines."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store


def open_process_group(store: Store, rank: int, size: int, device: torch.device) -> dist.ProcessGroup:
    """This process's default group: NCCL between GPUs, gloo between CPU processes. Every rank must call it."""
    assert not dist.is_initialized(), "a process has one default group"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("process_group", store),
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
    )
    assert dist.group.WORLD is not None
    return dist.group.WORLD
