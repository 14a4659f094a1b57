"""What of an engine's plan its settings and the checkpoint's headers say already, before any weight is read."""

from __future__ import annotations

import torch

from ..config import EngineConfig
from ..residency import bank_dtype
from .build import pick_device, pick_dtype
from .cores import cpu_threads
from .load import open_model


def plan_settings(config: EngineConfig) -> dict[str, object]:
    """Settings by name, with ``auto`` resolved, as JSON has them. Two engines that differ in one of them have different
    plans; equal ones may still differ in kernels or in sizes that free memory decides. Raises UsageError, ModelError.
    """
    device = pick_device(config.device)
    spec, _ = open_model(config.model, config.load_format, config.num_layers, config.revision)
    dtype = str(pick_dtype(config.dtype, spec, device)).removeprefix("torch.")
    split = config.strategy != "asyncep"
    return {
        "device": device.type,
        "dtype": dtype,
        "expert_dtype": bank_dtype(config, spec, dtype),
        "threads": cpu_threads(config.threads) if device.type == "cpu" else None,
        "sharing": config.sharing,
        "prune_last": config.prune_last,
        "kv_gib": config.kv_gib or 0.0,
        "strategy": f"{config.strategy} on {config.gpus}" if split else config.strategy,
        "torch": torch.__version__,
    }
