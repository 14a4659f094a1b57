"""How many blocks of prefix K and V a rank keeps. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

from ..config import EngineConfig
from ..core import ModelSpec
from ..errors import PlanError, UsageError
from ..memory import GIB, enough_tokens, kv_block_bytes, show_bytes
from .plan import Budget, ResidencyPlan
from .record import DTYPE_BYTES

_SHARES = (12, 24, 48)  # parts of a device's memory to try, largest first


def plan_with_prefixes(
    config: EngineConfig, spec: ModelSpec, budget: Budget, dtype: str, plan: Callable[[int], ResidencyPlan]
) -> ResidencyPlan:
    """``plan`` with the number of blocks that the settings ask for. UsageError: ``kv_gib`` holds not even one block.

    Where the settings leave it open and prefixes are worth keeping, the pool takes the largest part of ``_SHARES``
    beside which banks come from nowhere that they would not come from without it, and sweeps stay large enough.
    """
    block = kv_block_bytes(spec, DTYPE_BYTES[dtype])
    if config.kv_gib is not None:
        blocks = int(config.kv_gib * GIB) // block
        if config.kv_gib > 0 and blocks == 0:
            raise UsageError(
                f"--kv-gib is {config.kv_gib:g}, and 16 tokens of this model take {show_bytes(block)}; give more, or 0 "
                "to keep nothing"
            )
        return plan(blocks)
    without = plan(0)
    if not config.keep_prefixes:
        return without
    least = min(without.sweep.max_sweep_tokens, enough_tokens(budget.kind))
    for share in _SHARES:
        try:
            found = plan(budget.device_bytes // share // block)
        except PlanError:
            continue
        if set(found.levels) <= set(without.levels) and found.sweep.max_sweep_tokens >= least:
            return found
    return without
