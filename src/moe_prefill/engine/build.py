"""From settings to a running engine: device, dtype, threads, weights, memory plan. What does not fit is refused
before weights load.
"""

from __future__ import annotations

import math
import os

import torch

from ..config import EngineConfig
from ..core import ModelSpec
from ..errors import PlanError, UsageError
from ..experts import ResidentBanks
from ..shapes import bank_shapes, slot_shapes
from .load import load_weights, open_model
from .local import LocalEngine
from .memory import GIB, free_bytes, plan_memory


def build_engine(config: EngineConfig) -> LocalEngine:
    """An engine ready to score. Raises UsageError, ModelError or PlanError, each with the numbers, before any work is
    lost.
    """
    device = pick_device(config.device)
    if device.type == "cpu":
        # Hyperthreads bring nothing to matrix products, and the count must not change between a job and its resumption.
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    spec, _ = open_model(config.model, config.load_format, config.num_layers)
    dtype = pick_dtype(config.dtype, spec, device)
    limit_gib = config.memory_gib if device.type == "cuda" else config.host_gib or config.memory_gib
    budget = free_bytes(device, limit_gib) - weight_bytes(spec, dtype)
    if budget <= 0:
        raise PlanError(
            f"the weights of {config.model} take {weight_bytes(spec, dtype) / GIB:.2f} GiB in {dtype}, and "
            f"{free_bytes(device, limit_gib) / GIB:.2f} GiB may be used on {device}; "
            "use a larger device or a smaller dtype"
        )
    memory = plan_memory(spec, device, dtype, budget, config.max_sweep_tokens)
    spec, weights, banks = load_weights(
        config.model,
        device=device,
        dtype=dtype,
        load_format=config.load_format,
        seed=config.seed,
        skew=config.dummy_skew or 1.0,
        num_layers=config.num_layers,
    )
    return LocalEngine(
        spec,
        weights,
        ResidentBanks(banks),
        memory,
        device=device,
        sharing=config.sharing,
        prune_last=config.prune_last,
    )


def weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of every tensor of the model, banks included."""
    shapes = slot_shapes(spec) | bank_shapes(spec)
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def pick_device(name: str) -> torch.device:
    """``auto``: the first GPU where there is one. UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"device {name!r} was asked for, and this machine has {count} CUDA devices")
        return torch.device("cuda", device.index or 0)
    return device


def pick_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """``auto``: the published dtype; float16 checkpoints are computed in bfloat16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if spec.dtype == "float16":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if spec.dtype == "float32" else torch.bfloat16
