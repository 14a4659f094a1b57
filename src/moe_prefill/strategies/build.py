"""From settings and a process group to one rank's engine. What the shapes or the memory do not allow is refused before
weights load.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..checkpoint import Checkpoint
from ..config import EngineConfig
from ..core import Int64Array, ModelSpec
from ..engine.build import pick_dtype
from ..engine.load import open_model
from ..engine.memory import cpu_limit_gib, free_bytes
from ..engine.progress import LayerCounter
from ..errors import PlanError, UsageError
from ..memory import DeviceKind, MemoryPlan, memory_plan
from ..models.decoder import Decoder
from ..models.weights import ExpertBank, ModelWeights
from ..residency import bank_dtype
from .collectives import Collectives, RankGroup
from .data_parallel import ExpertDispatch, TokenGather
from .engine import DataParallelEngine, RankModel, StrategyEngine, TensorParallelEngine
from .load import checkpoint_fill, dummy_fill, load_share
from .memory import fit_share
from .pipeline import PipelineEngine
from .share import Share, share_of
from .tensor_parallel import TensorParallelDecoder


def build_strategy_engine(
    config: EngineConfig, ranks: RankGroup, layers_done: Int64Array | None = None
) -> StrategyEngine:
    """This rank's engine of ``config.strategy``; every rank calls this. Raises UsageError, ModelError or PlanError,
    each with the numbers, on every rank alike. ``layers_done`` int64 [1] counts the layers that have been computed.
    """
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)  # kernels are launched on the current device
    else:
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // ranks.size))
    spec, checkpoint = open_model(config.model, config.load_format, config.num_layers, config.revision)
    dtype = pick_dtype(config.dtype, spec, ranks.device)
    share = requested_share(config, spec, ranks.rank, ranks.size)
    memory = agreed_plan(config, share, ranks, dtype)
    weights, banks = load_rank(config, share, checkpoint, ranks.device, dtype)
    engine = strategy_engine(config, share, ranks, weights, banks, memory)
    engine.on_layer = None if layers_done is None else LayerCounter(layers_done, ranks.device)
    return engine


def load_rank(
    config: EngineConfig, share: Share, checkpoint: Checkpoint | None, device: torch.device, dtype: torch.dtype
) -> tuple[ModelWeights, list[ExpertBank | None]]:
    """The rank's weights and banks, made up where there is no checkpoint."""
    if checkpoint is None:
        fill = dummy_fill(share, dtype=dtype, device=device, seed=config.seed, skew=config.dummy_skew or 1.0)
    else:
        fill = checkpoint_fill(share, checkpoint, dtype=dtype, device=device)
    return load_share(share, fill, bank_dtype(config, share.whole, dtype_name(dtype)))


def requested_share(config: EngineConfig, spec: ModelSpec, rank: int, size: int) -> Share:
    """What the strategy gives this rank. UsageError: not one of the baselines, or not for these shapes."""
    if config.strategy == "asyncep":
        raise UsageError("strategy asyncep moves weights; it is not one of those that split a model over ranks")
    return share_of(spec, config.strategy, rank, size)


def strategy_engine(
    config: EngineConfig,
    share: Share,
    ranks: RankGroup,
    weights: ModelWeights,
    banks: Sequence[ExpertBank | None],
    memory: MemoryPlan,
) -> StrategyEngine:
    """The engine over weights that are there."""
    collectives, dtype = Collectives(ranks), weights.embed.dtype

    def part(decoder: Decoder) -> RankModel:
        return RankModel(
            share=share, decoder=decoder, collectives=collectives, weights=weights, banks=banks, memory=memory
        )

    if share.name == "pp+pp":
        return PipelineEngine(part(Decoder(share.spec)), config)
    if share.splits_attention:
        return TensorParallelEngine(part(TensorParallelDecoder(share, collectives)), config)
    if share.name == "dp+ep":
        return DataParallelEngine(part(ExpertDispatch(share, collectives, dtype, memory.chunk_rows)), config)
    return DataParallelEngine(part(TokenGather(share, collectives, dtype)), config)


def plan_share(config: EngineConfig, share: Share, device: torch.device, dtype: torch.dtype) -> MemoryPlan:
    """Sweep and chunk sizes from the device's memory. PlanError, with the numbers, when nothing fits."""
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    limit = config.memory_gib if kind == "cuda" else cpu_limit_gib(config)
    free = free_bytes(device, limit) // (1 if kind == "cuda" else share.size)
    name = dtype_name(dtype)
    sizes = {"wanted": config.max_sweep_tokens, "chunk_rows": config.chunk_rows}
    return fit_share(share, kind, free, dtype=name, bank_dtype=bank_dtype(config, share.whole, name), **sizes).sweep


def agreed_plan(config: EngineConfig, share: Share, ranks: RankGroup, dtype: torch.dtype) -> MemoryPlan:
    """The smallest sizes that any rank has room for, since plans must be cut alike. PlanError on all ranks or none."""
    refused, sizes = None, [0, 0]
    try:
        plan = plan_share(config, share, ranks.device, dtype)
        sizes = [plan.max_sweep_tokens, plan.chunk_rows]
    except PlanError as error:
        refused = error
    all_sizes = Collectives(ranks).gather_host(sizes)
    if not all_sizes.all():
        raise refused or PlanError(f"rank {int(all_sizes[:, 0].argmin())} has no room for its part of the model")
    tokens, rows = all_sizes.min(axis=0).tolist()
    return memory_plan(share.spec, dtype.itemsize, tokens, rows)


def dtype_name(dtype: torch.dtype) -> str:
    """As settings have it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
