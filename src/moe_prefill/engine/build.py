"""From settings to a running engine: device, dtype, threads, weights, memory plan. What does not fit is refused
before weights load.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace

import torch

from .. import ops
from ..config import EngineConfig
from ..core import Int64Array, ModelSpec
from ..errors import UsageError
from ..experts import ALONE, Ranks
from ..machine import datasheet, estimated_profile, load_profile
from ..residency import Budget, ResidencyPlan, plan_for
from ..shapes import block_slots, float8_slots, linear_slots, slot_shapes
from .banks import BankMemory
from .cores import cpu_threads, keep_freed_memory
from .load import load_weights, open_model
from .local import LocalEngine
from .memory import cpu_limit_gib, free_bytes, host_pool_bytes
from .progress import LayerCounter
from .quantized import FORMS, blocks_of
from .trace import TraceWriter

_log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, ranks: Ranks = ALONE, layers_done: Int64Array | None = None) -> LocalEngine:
    """An engine ready to score. Raises UsageError, ModelError or PlanError, each with the numbers, before any work is
    lost. ``layers_done`` int64 [1] counts the layers that have been computed.
    """
    device = rank_device(config.device, ranks)
    threads = prepare(device, config.threads)
    trace = None if config.trace is None else TraceWriter(trace_path(config.trace, ranks), ranks.rank)
    spec, _ = open_model(config.model, config.load_format, config.num_layers, config.revision)
    dtype = pick_dtype(config.dtype, spec, device)
    plan = plan_within(config, spec, dtype, agreed_budget(rank_budget(config, device, ranks.size), ranks))
    form = float8_form(spec, plan.bank_dtype, dtype, device)
    expert_blocks, linear_blocks = blocks_of(form)
    banks = BankMemory(
        spec,
        plan.levels,
        dtype=getattr(torch, plan.bank_dtype),
        blocks=expert_blocks,
        device=device,
        buffers=plan.bank_buffers,
        staged_shards=plan.staged_shards,
        ranks=ranks,
        transport=config.transport,
    )
    spec, weights, _ = load_weights(
        config.model,
        revision=config.revision,
        device=device,
        dtype=dtype,
        load_format=config.load_format,
        seed=config.seed,
        skew=config.dummy_skew or 1.0,
        num_layers=config.num_layers,
        allocate=banks.allocate,
        keep=banks.keep,
        float8=form is not None,
        blocks=linear_blocks,
        check_finite=config.check_finite,
    )
    return LocalEngine(
        spec,
        weights,
        banks.source(),
        plan.sweep,
        device=device,
        sharing=config.sharing,
        prune_last=config.prune_last,
        quantization=form,
        rounds=banks.in_rounds,
        on_layer=None if layers_done is None else LayerCounter(layers_done, device),
        trace=trace,
        residency=plan,
        threads=threads,
        kv_blocks=plan.kv_blocks,
        worker=ranks.rank,
        check_finite=config.check_finite,
    )


def prepare(device: torch.device, threads: int | None) -> int:
    """Set torch and the allocators of this process up for a device; the number of threads, which must not change
    between a job and its resumption.
    """
    if device.type == "cuda":
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # Weights of all sizes come first and activations after them: without this, gaps of gigabytes stay unused.
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)  # kernels are launched on the current device
        return 1
    count = cpu_threads(threads)
    torch.set_num_threads(count)
    keep_freed_memory()
    return count


def float8_form(spec: ModelSpec, bank_dtype: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """How float8 is computed here, one of ``quantized.FORMS`` or ``fp8-weights`` (the weights only); None: the model
    is not in float8. What is not computed as published is logged.
    """
    if getattr(torch, bank_dtype) != ops.FLOAT8:
        return None
    shapes = slot_shapes(spec)
    wide = [slot for slot in linear_slots(shapes) if slot not in float8_slots(shapes)]
    if wide:
        sizes = " x ".join(map(str, shapes[wide[0]]))
        _log.warning(
            "%d linear maps stay in %s, first %s: %s are not multiples of 16", len(wide), dtype, wide[0], sizes
        )
    if not ops.has_float8(device):
        _log.warning(
            "%s has no float8 products: weights are kept in float8 and widened when they are read, which saves memory "
            "and no time",
            torch.cuda.get_device_name(device),
        )
        return "fp8-weights"
    refusal = ops.blocks_refused(spec.hidden_size, spec.expert_size, dtype, device)
    if refusal is not None and spec.float8_blocks:
        _log.warning("experts published with block scales are quantised again with a scale a row: %s", refusal)
    linear = spec.float8_blocks and _keeps_blocks(spec, dtype, device)
    return next(form for form, blocks in FORMS.items() if blocks == (refusal is None, linear))


def _keeps_blocks(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether linear maps that are published with block scales keep them; says which do, and why others do not."""
    found, kept = linear_slots(slot_shapes(spec)), block_slots(spec)
    refusal = ops.block_linear_refused(dtype, device)
    if refusal is not None:
        kept = set()
    if again := len(found) - len(kept):
        why = refusal or "they do not consist of whole blocks of 128 x 128"
        _log.warning(
            "%d linear maps published with block scales are quantised again with a scale a row: %s", again, why
        )
    if kept:
        kernel = ops.block_linear_kernel(device)
        _log.info("%d linear maps keep their published block scales, kernel %s", len(kept), kernel)
    return bool(kept)


def trace_path(path: str, ranks: Ranks) -> str:
    """Several ranks write a file each."""
    return path if ranks.size == 1 else f"{path}.rank{ranks.rank}"


def plan_within(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, budget: Budget) -> ResidencyPlan:
    """What a rank with this memory holds. Raises UsageError and PlanError."""
    profile, gpu = None, torch.cuda.get_device_name() if budget.kind == "cuda" else "cpu"
    if config.profile is not None:
        profile = load_profile(config.profile, gpu)
    elif datasheet(gpu) is not None:
        profile = estimated_profile(gpu)
    return plan_for(config, spec, budget, dtype=str(dtype).removeprefix("torch."), profile=profile)


def rank_budget(config: EngineConfig, device: torch.device, ranks: int = 1) -> Budget:
    """The memory of one of ``ranks`` ranks. On a CPU both kinds are the host's, which the ranks share; there a bank is
    moved only where the user pins that.
    """
    if device.type == "cuda":
        host = host_pool_bytes(config.host_gib) // ranks
        sharers = ranks if ":" in config.device else 1
        return Budget(device_bytes=free_bytes(device, config.memory_gib) // sharers, host_bytes=host, ranks=ranks)
    mine = free_bytes(device, cpu_limit_gib(config)) // ranks
    pinned = config.residency not in (None, "auto")
    return Budget(device_bytes=mine, host_bytes=mine if pinned else 0, ranks=ranks, kind="cpu")


def agreed_budget(mine: Budget, ranks: Ranks) -> Budget:
    """The least that any rank has, measured before any of them allocates: all ranks make the same plan."""
    offers = [json.loads(offer) for offer in ranks.exchange("budget", json.dumps(asdict(mine)).encode())]
    least = {name: min(offer[name] for offer in offers) for name in ("device_bytes", "host_bytes")}
    return replace(mine, **least)


def rank_device(name: str, ranks: Ranks) -> torch.device:
    """The rank's own GPU, or the one device that all were told to use. UsageError where there are too few."""
    device = pick_device(name)
    if device.type == "cpu" or ":" in name:
        return device
    count = torch.cuda.device_count()
    if ranks.size > count:
        raise UsageError(
            f"{ranks.size} GPUs were asked for, and this machine has {count}; give --gpus {count} or fewer"
        )
    return torch.device("cuda", ranks.rank)


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
