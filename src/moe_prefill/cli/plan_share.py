"""``moe-prefill plan`` for the strategies that asyncep is compared with: what a rank holds, and its largest sweep."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from ..core import ModelSpec
from ..costmodel import Batch, predict_strategy
from ..errors import UsageError
from ..machine import estimated_profile, load_profile
from ..memory import show_bytes
from ..residency import DTYPE_BYTES, bank_dtype
from ..residency.speed import PRECISIONS, with_chunks
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
    fields = share_fields(options, share, memory, dtype) | forecast_fields(options, share, memory, experts)
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


def forecast_fields(options: PlanOptions, share: Share, memory: ShareMemory, experts: str) -> dict[str, Any]:
    """What is predicted of the planned sweep, in the steady state; times in seconds, of all ranks. ``unpredicted`` says
    why nothing is.
    """
    config, sweep = options.config, memory.sweep
    profile = estimated_profile(options.gpu) if config.profile is None else load_profile(config.profile)
    known = {
        "profile": {"gpu": profile.gpu, "estimated": profile.is_estimated},
        "tokens_per_request": options.tokens_per_request,
    }
    try:
        found = predict_strategy(
            share.whole,
            share.name,
            share.size,
            Batch.uniform(sweep.max_sweep_tokens, options.tokens_per_request, prune_last=config.prune_last),
            with_chunks(profile, sweep.chunk_rows),
            precision=PRECISIONS[experts],
            skew=config.dummy_skew or 1.0,
            micro_batches=config.micro_batches,
        )
    except UsageError as error:  # the card has no such products, or no link
        return known | {"unpredicted": str(error)}
    return known | {
        "sweep_s": found.sweep_s,
        "compute_s": found.compute_s,
        "transfer_s": found.transfer_s,
        "fill_s": found.fill_s,
        "tokens_per_s": found.tokens_per_s,
    }


def _forecast(fields: dict[str, Any]) -> str:
    """The same for people."""
    if "unpredicted" in fields:
        return str(fields["unpredicted"])
    known = "estimated from its datasheet, not measured" if fields["profile"]["estimated"] else "measured"
    return (
        f"{fields['profile']['gpu']} ({known}): a sweep takes {fields['sweep_s']:.2f} s, "
        f"{fields['transfer_s']:.2f} s of them collectives; {fields['tokens_per_s']:,.0f} tokens/s of all GPUs, "
        f"requests of {fields['tokens_per_request']:,} tokens"
    )


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
    say(console, "predicted", _forecast(fields))
    say(
        console,
        "largest",
        f"{memory.largest_sweep_tokens:,} tokens with the smallest chunks; the model's context has "
        f"{spec.max_positions:,}",
    )
