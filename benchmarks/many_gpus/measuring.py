"""Cells of sides: the settings that are predicted to be best are tried, and the fastest is measured."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_prefill.bench import save_report
from moe_prefill.core import AtomicRequest
from moe_prefill.engine import LocalEngine, peak_bytes
from moe_prefill.engine.load import open_model
from moe_prefill.errors import MoePrefillError
from moe_prefill.machine import datasheet_peak
from moe_prefill.residency import ResidencyPlan

from .contenders import AsyncEp, Contender, Rank, contender_of, settings_of
from .requests import MIXED, dealt, lengths_of, requests_of
from .sides import Length, Setting, Side

GIB = 1 << 30
_LONG_S = 15.0  # that timed runs need not take longer
PLANNED_PEAK = "predicted_peak_hbm_gib"


def run_rank(
    rank: int, size: int, sides: Sequence[Side], options: argparse.Namespace, folder: str, head: dict[str, Any]
) -> None:
    """What each process does: every side in turn; the first rank writes the results behind each."""
    mine = Rank(rank, size, options, folder)
    for side in sides:
        cells, refused = [], []
        try:
            contender = contender_of(mine, side)
        except MoePrefillError as error:
            refused.append(str(error))
        else:
            for length in side.lengths:
                forecast = options.forecasts[side, length]
                found, tried = measure(mine, contender, length, forecast.best_first or settings_of(options, side))
                cells += [found | compared(found, forecast.cell)] if found is not None else []
                refused += [] if found is not None else [f"{length} tokens: {tried or 'no setting holds a request'}"]
            contender.close()
        if rank == 0:
            report(options, head, side, cells, refused)
    dist.destroy_process_group()


def report(
    options: argparse.Namespace, head: dict[str, Any], side: Side, cells: list[dict[str, Any]], refused: list[str]
) -> None:
    """Print a side's cells and add them, and what was refused, to the results."""
    new = [f"{side.part}, {side.gpus} GPUs, {side.name}, skew {side.skew:g}: {why}" for why in refused]
    head = {**head, "refused": refusals(options.out, new)}
    for cell in cells:
        shown = f"{cell['tokens_per_s']:>12,.0f} tokens/s"
        print(f"{side.part:10} {side.name:18} skew {side.skew:<4g} {shown_length(cell['tokens'])}: {shown}", flush=True)
    for why in refused:
        print(f"{side.part:10} {side.name:18} skew {side.skew:<4g} refused: {why}", flush=True)
    save_report(options.out, head, cells, append=True)


def refusals(path: Path, new: Sequence[str]) -> list[str]:
    """What was refused in earlier calls and in this one."""
    old = json.loads(path.read_text(encoding="utf-8")).get("refused", []) if path.exists() else []
    return list(dict.fromkeys([*old, *new]))


def shown_length(length: Length) -> str:
    return f"{length:>7,}" if isinstance(length, int) else f"{length:>7}"


def compared(cell: dict[str, Any], forecast: dict[str, Any]) -> dict[str, Any]:
    """What was predicted beside what was measured."""
    found = {key: value for key, value in forecast.items() if key.startswith("predicted_")}
    if "predicted_tokens_per_s" in found:
        found["measured_over_predicted"] = cell["tokens_per_s"] / found["predicted_tokens_per_s"]
    return found


def measure(
    rank: Rank, contender: Contender, length: Length, best_first: Sequence[Setting]
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """A cell, where any setting fits, and what was refused. Of the settings that fit, as many as ``--search`` says are
    run once to warm up and once timed, and the fastest is measured; a single one is measured at once.
    """
    if rank.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rank.device)
    options, side, longest = rank.options, contender.side, max(lengths_of(rank.options, length))
    spec, _ = open_model(options.model, "dummy", side.layers)
    requests = dealt(spec, side, requests_of(options, side, length, spec.vocab_size))[rank.rank]
    fitting = [each for each in best_first if each in contender.settings and each.sweep_tokens >= longest]
    chosen, tried = fitting[: options.search], dict[Setting, float]()
    if not chosen:
        return None, contender.refused
    for setting in chosen if len(chosen) > 1 else ():
        with contender.engine(setting) as engine:
            rank.seconds(engine, requests)
            tried[setting] = rank.seconds(engine, requests)
    best = min(chosen, key=lambda setting: tried.get(setting, 0.0))
    with contender.engine(best) as engine:
        cell = cell_of(rank, contender, engine, best, requests, length)
    searched = {str(setting): took for setting, took in tried.items()}
    return cell | {"searched_s": searched, "refused": contender.refused}, contender.refused


def cell_of(
    rank: Rank,
    contender: Contender,
    engine: LocalEngine,
    setting: Setting,
    requests: list[AtomicRequest],
    length: Length,
) -> dict[str, Any]:
    previous = rank.seconds(engine, requests)
    for _ in range(rank.options.warm_up):
        now = rank.seconds(engine, requests)
        agreed, previous = abs(now - previous) <= 0.02 * previous, now
        if agreed:
            break
    flops, exposed, sweeps = engine.stats.flops, engine.stats.exposed_s, engine.stats.sweeps
    runs: list[float] = []
    while not enough(rank.options, runs):
        runs.append(rank.seconds(engine, requests))
    side = contender.side
    median, each = statistics.median(runs), rank.size if side.owns_requests else 1
    mine = (engine.stats.flops - flops) // len(runs), len(requests), sum(len(each.tokens) for each in requests)
    flops, count, total = map(rank.total, mine) if side.owns_requests else mine
    cell = {
        **cell_head(rank.options, side, length),
        "layers": engine.spec.num_layers,
        "requests": count * len(runs),
        "run_tokens": total,
        "sweep_tokens": setting.sweep_tokens,
        "chunk_rows": setting.chunk_rows,
        **({"micro_batches": setting.micro_batches} if side.strategy == "pp+pp" else {}),
        "transport": side.transport if side.residency else dist.get_backend(),
        "tokens_per_s": total / median,
        "sweep_ms": 1e3 * median * setting.sweep_tokens * each / total,
        "expert_load_max_over_mean": expert_load(rank, contender, engine, requests),
        "command": "python " + " ".join(sys.argv),
    }
    if isinstance(contender, AsyncEp):
        levels = engine.residency.levels if engine.residency is not None else ()
        cell["levels"] = ", ".join(f"{levels.count(level)} {level}" for level in dict.fromkeys(levels) if level)
        cell["exposed_ms"] = 1e3 * (engine.stats.exposed_s - exposed) / max(1, engine.stats.sweeps - sweeps)
    if rank.device.type == "cuda":
        cell["peak_hbm_gib"] = rank.most(peak_bytes(rank.device)) / GIB
        precision = {"fp8": "float8", "bf16": "bfloat16", "fp32": "float32"}[rank.options.precision]
        peak = datasheet_peak(torch.cuda.get_device_name(rank.device), precision)
        if peak is not None:
            cell["mfu"] = flops / median / (peak * rank.size)
    return cell


def enough(options: argparse.Namespace, runs: Sequence[float]) -> bool:
    """``--least-runs`` and ``--seconds``, but two are enough where they take 15 s."""
    if len(runs) >= 2 and sum(runs) >= _LONG_S:
        return sum(runs) >= options.seconds
    return len(runs) >= options.least_runs and sum(runs) >= options.seconds


def planned_memory(plan: ResidencyPlan) -> dict[str, Any]:
    """Where the banks live, and what is planned for each device and for the host (all ranks)."""
    levels = ", ".join(f"{plan.count(level)} {level}" for level in dict.fromkeys(filter(None, plan.levels)))
    host = {"host_gib": plan.ranks * plan.peak_host_bytes / GIB} if plan.peak_host_bytes else {}
    return {"levels": levels, PLANNED_PEAK: plan.peak_device_bytes / GIB, **host}


def cell_head(options: argparse.Namespace, side: Side, length: Length) -> dict[str, Any]:
    """What a cell is of, measured or predicted."""
    found = {
        "part": side.part,
        "engine": "moe-prefill",
        "model": options.name,
        "layers": side.layers,
        "precision": options.precision,
        "gpus": side.gpus,
        "strategy": side.strategy,
        "residency": side.residency,
        "dummy_skew": side.skew,
        "tokens": length,
        "lengths": options.mixed if length == MIXED else None,
        "transport": side.transport if side.residency else None,
        "hbm_gib": side.hbm_gib or options.hbm_gib,
    }
    return {key: value for key, value in found.items() if value is not None}


def expert_load(rank: Rank, contender: Contender, engine: LocalEngine, requests: list[AtomicRequest]) -> float:
    """Tokens of the most loaded expert over the mean, averaged over layers; from an eighth of a run."""
    counts: dict[int, torch.Tensor] = {}
    decoder, route = engine._decoder, engine._decoder.route

    def counted(weights: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = route(weights, x)
        found = torch.bincount(chosen[1].flatten(), minlength=engine.spec.num_experts)
        key = id(weights)
        counts[key] = counts[key] + found if key in counts else found
        return chosen

    decoder.route = counted  # type: ignore[method-assign]
    rank.answers(engine, requests[: -(-len(requests) // 8)])
    decoder.route = route  # type: ignore[method-assign]
    loads = torch.stack(list(counts.values())).cpu()
    if contender.side.owns_requests:
        loads = torch.from_numpy(rank.collectives.gather_host(loads.flatten().tolist()).sum(0)).view(loads.shape)
    return float((loads.max(1).values / loads.double().mean(1)).mean())
