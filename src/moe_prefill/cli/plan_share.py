"""``moe-prefill plan`` for the strategies that asyncep is compared with: what a rank holds, and its largest sweep."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from ..core import ModelSpec
from ..memory import show_bytes
from ..residency import DTYPE_BYTES, bank_dtype
from ..strategies import Share, share_of
from ..strategies.memory import ShareMemory, fit_share, mean_ranks_a_row, share_weights, transfer_bytes
from .plan import PlanOptions, computed_dtype, device_budget
from .plan_view import say, show_bytes_table, show_head


def show_share(options: PlanOptions, spec: ModelSpec) -> None:
    """Print the plan of the rank that holds most. UsageError: the shapes do not allow the strategy. PlanError: it does
    not fit.
    """
    config, strategy = options.config, options.config.strategy
    dtype = computed_dtype(config, spec)
    experts = bank_dtype(config, spec, dtype)
    assert strategy != "asyncep"
    shares = [share_of(spec, strategy, rank, options.ranks) for rank in range(options.ranks)]
    share = max(shares, key=lambda each: sum(share_weights(each, dtype, experts).values()))
    budget = device_budget(options)
    memory = fit_share(
        share,
        budget.kind,
        budget.device_bytes,
        dtype=dtype,
        bank_dtype=experts,
        wanted=config.max_sweep_tokens,
        chunk_rows=config.chunk_rows,
    )
    fields = share_fields(options, share, memory, dtype)
    if options.json:
        print(json.dumps(fields))
    else:
        _show(options, share, memory, fields)


def share_fields(options: PlanOptions, share: Share, memory: ShareMemory, dtype: str) -> dict[str, Any]:
    """Everything that is printed, for programs; sizes in bytes, of one rank. Names as for asyncep."""
    sweep = memory.sweep
    fields = {
        "model": options.config.model,
        "strategy": share.name,
        "gpus": share.size,
        "dtype": dtype,
        "bank_dtype": bank_dtype(options.config, share.whole, dtype),
        "device_bytes": dict(memory.device_bytes),
        "peak_device_bytes": sum(memory.device_bytes.values()),
        "sweep_tokens": sweep.max_sweep_tokens,
        "sweep_is_of": "rank" if share.is_data_parallel else "group",
        "chunk_rows": sweep.chunk_rows,
        "longest_request": min(share.whole.max_positions, sweep.max_sweep_tokens),
        "largest_sweep_tokens": memory.largest_sweep_tokens,
    }
    if share.name == "dp+ep":
        mean, sizes = mean_ranks_a_row(share), (sweep.max_sweep_tokens, sweep.chunk_rows)
        fields["mean_ranks_a_row"] = mean
        fields["mean_sent_and_received_bytes"] = transfer_bytes(share, DTYPE_BYTES[dtype], *sizes, mean)
    return fields


def _show(options: PlanOptions, share: Share, memory: ShareMemory, fields: dict[str, Any]) -> None:
    console, spec, sweep = Console(highlight=False), share.whole, memory.sweep
    types = f"experts {fields['bank_dtype']}, the rest {fields['dtype']}"
    show_head(console, options, spec, types)
    budget = device_budget(options).device_bytes
    show_bytes_table(console, memory.device_bytes, budget, f"device memory of rank {share.rank}, which holds most")
    if share.name == "dp+ep":
        say(
            console,
            "dispatch",
            f"sent and received: {show_bytes(memory.device_bytes['sent and received'])} if all rows come to one rank, "
            f"{show_bytes(fields['mean_sent_and_received_bytes'])} when experts are chosen evenly "
            f"({fields['mean_ranks_a_row']:.2f} ranks a row)",
        )
    owner = "of each GPU's own requests" if share.is_data_parallel else "of all GPUs together"
    say(
        console,
        "sweep",
        f"{sweep.max_sweep_tokens:,} tokens {owner}, chunks of {sweep.chunk_rows:,} rows; longest request "
        f"{fields['longest_request']:,} tokens",
    )
    say(
        console,
        "largest",
        f"{memory.largest_sweep_tokens:,} tokens with the smallest chunks; the model's context has "
        f"{spec.max_positions:,}",
    )
