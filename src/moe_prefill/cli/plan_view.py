"""How a plan is shown to people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core import ModelSpec
from ..memory import show_bytes
from ..residency import ResidencyPlan
from .plan import Forecast, PlanOptions


def show_asyncep(options: PlanOptions, spec: ModelSpec, plan: ResidencyPlan, forecast: Forecast) -> None:
    """Memory by purpose, residency, sweep and forecast."""
    console = Console(highlight=False)
    show_head(console, options, spec, f"experts {plan.bank_dtype}, the rest {plan.dtype}")
    show_bytes_table(console, plan.device_bytes, plan.budget.device_bytes, "device memory of each GPU")
    if plan.peak_host_bytes:
        limit = None if options.config.host_gib is None else plan.budget.host_bytes
        show_bytes_table(console, plan.host_bytes, limit, "host memory for each GPU")
    say(console, "residency", plan.map)
    say(console, "", _levels(plan))
    if plan.remedy is not None:
        say(console, "", plan.remedy)
    say(
        console,
        "sweep",
        f"{plan.sweep.max_sweep_tokens:,} tokens, chunks of {plan.sweep.chunk_rows:,} rows; longest request "
        f"{plan.longest_request:,} tokens",
    )
    say(
        console,
        "largest",
        f"{plan.largest_sweep_tokens:,} tokens at these levels, {plan.largest_streamed_tokens:,} if all banks stream "
        f"that can; the model's context has {spec.max_positions:,}",
    )
    _show_forecast(console, options, plan, forecast)


def _levels(plan: ResidencyPlan) -> str:
    counts = [f"{plan.count(level)} {level}" for level in ("resident", "sharded", "hybrid", "offloaded")]
    text = ", ".join(count for count in counts if not count.startswith("0 ")) or "no layer has experts"
    if plan.num_streamed:
        text += f"; {plan.bank_buffers} bank buffers of {show_bytes(plan.bank_bytes)}"
    if plan.staged_shards:
        text += f", {plan.staged_shards} staged shards of {show_bytes(plan.shard_bytes)}"
    return text


def _show_forecast(console: Console, options: PlanOptions, plan: ResidencyPlan, forecast: Forecast) -> None:
    profile, sweep, t = forecast.profile, forecast.sweep, forecast.saturation
    tokens = plan.sweep.max_sweep_tokens
    source = "estimated from its datasheet, not measured" if profile.is_estimated else f"measured {profile.date}"
    say(console, "predicted", f"{profile.gpu} ({source}), requests of {options.tokens_per_request:,} tokens")
    say(
        console,
        "",
        f"a sweep takes {sweep.sweep_s:.2f} s, {sweep.exposed_s * 1e3:.1f} ms of them waiting for banks (the first "
        f"{sweep.exposed_first_s * 1e3:.1f} ms): {tokens / sweep.sweep_s:,.0f} tokens/s a GPU",
    )
    if t is None:
        say(console, "T", str(forecast.unsaturated))
        return
    reached = "reached" if tokens >= t.tokens else "NOT reached by the planned sweep"
    paper = f"; t_paper {t.t_paper:.3g} FLOPs" if t.t_paper else ""
    say(console, "T", f"{t.flops:.3g} FLOPs, {t.tokens:,} tokens: {reached}{paper}")


def show_head(console: Console, options: PlanOptions, spec: ModelSpec, types: str) -> None:
    """One line: the model, the GPUs, the strategy."""
    gpus = f"{options.ranks} GPU{'s' * (options.ranks > 1)} of {options.config.memory_gib:g} GiB"
    layers = f"{spec.num_layers} layers, {spec.num_sparse_layers} with experts"
    line = f"{options.config.model} ({layers}; {types}) on {gpus}, {options.config.strategy}"
    console.print(Text(line, style="bold"), soft_wrap=True)


def show_bytes_table(console: Console, sizes: Mapping[str, int], limit: int | None, title: str) -> None:
    """Sizes by purpose, their sum, and the limit that it is held against."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(min_width=28)
    table.add_column(justify="right")
    for name, size in sizes.items():
        if size:
            table.add_row(name, show_bytes(size))
    of = "" if limit is None else f" of {show_bytes(limit)}"
    table.add_row(Text("in all", style="bold"), Text(show_bytes(sum(sizes.values())) + of, style="bold"))
    console.print(table)


def say(console: Console, name: str, text: str) -> None:
    """One line under a name."""
    console.print(Text(f"{name:<11}{text}"), soft_wrap=True)
