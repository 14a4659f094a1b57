"""Routing policies in virtual time: Qwen3-235B-A22B, FP8 experts, H200s, on the paper's aggregated workload and mixes.

    python benchmarks/frontend_sim.py --out benchmarks/results/frontend_sim.json  # about 28 minutes of one core
    python benchmarks/frontend_sim.py --scale 0.02 --workers 2 8 --out /tmp/small.json

The router, its tables and the forming of sweeps are the real ones; workers take the time that the cost model predicts
from a machine profile (``--profile``, or rates estimated from the datasheet). Every policy gets the same sweeps, the
same KV pool and the same memory bound. ``returning`` is the questions about passages, in six parts, each when the one
before is answered: there a pool is of use. Time between parts does not count.

Also measured, in processor seconds of this machine: hashing and routing of the whole workload by one process; and the
memory of the tables. The results file is written after every cell.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_prefill.blocks import BlockHasher
from moe_prefill.core import ModelSpec
from moe_prefill.frontend import (
    POLICIES,
    Extensions,
    Frontend,
    Ours,
    Policy,
    PrefixTable,
    Ticket,
    make_policy,
    make_ticket,
)
from moe_prefill.machine import MachineProfile, estimated_profile, load_profile
from moe_prefill.models import preset, spec_from_hf
from moe_prefill.simulate import Machine, Outcome, oracle_saved_tokens, plan_machine, simulate
from moe_prefill.workloads import MIXES, Workload, make_workload

MODEL, GPU = "Qwen3-235B-A22B", "NVIDIA H200"
CONTEXT = 131_072  # the model with its long-context setting: the workload's papers have up to 128K tokens
SWEEP_TOKENS = 131_072
DEVICE_GIB, HOST_GIB = 139, 1024
BURST_INTERVAL_S = 25.0  # about what one of eight bursts takes eight workers
WITHOUT = {
    "look-ahead": {"look_ahead": False},
    "long-first": {"long_first": False},
    "postpone": {"postpone": False},
    "held-first": {"held_first": False},
    "renew": {"renew": False},
    "memory-bound": {"memory_bound": False},
    "together": {"together": 0},
    "spill": {"spill": False},
}
RETURNING, PARTS = "returning", 6
APART_S = 1e6
ABLATED_MIXES = ("aggregated", "low", "hot-prefix", "hot-few", "bursts", RETURNING)


def main() -> None:
    options = _options()
    profile = _with_links(load_profile(options.profile)) if options.profile else estimated_profile(GPU)
    spec = replace(spec_from_hf(preset(MODEL)), max_positions=CONTEXT)
    report: dict[str, Any] = {
        "gpu": profile.gpu,
        "rates": "estimated" if profile.is_estimated else "measured",
        "profile": _named(profile),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "git": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip(),
        "model": MODEL,
        "precision": "fp8",
        "scale": options.scale,
        "seed": options.seed,
    }
    cells: list[dict[str, Any]] = []
    if options.keep:
        kept = json.loads(Path(options.out).read_text(encoding="utf-8"))
        cells = [cell for cell in kept.pop("cells") if cell["mix"] not in options.mixes]
        report = {**kept, "command_of_others": kept["command"], **report}
    for mix in options.mixes:
        workload = _workload(mix, options)
        tickets, hash_s = _hashed(workload, spec)
        oracle = oracle_saved_tokens(tickets) / workload.num_tokens
        if mix == "aggregated":
            report["routing"] = _routing_cost(tickets, _machine(spec, profile, 8, options.kv_gib[0]), hash_s)
        for workers, kv_gib, name, make in _runs(mix, options):
            machine = _machine(spec, profile, workers, kv_gib)
            begun = time.perf_counter()
            outcome = simulate(tickets, machine, workers, make(machine))
            cells.append(
                {
                    "model": MODEL,
                    "mix": mix,
                    "requests": len(tickets),
                    "workers": workers,
                    "policy": name,
                    "kv_gib": kv_gib,
                    **_measured(outcome),
                    **(_in_parts(outcome, tickets) if mix == RETURNING else {}),
                    "oracle_fraction": round(oracle, 5),
                    "simulated_in_s": round(time.perf_counter() - begun, 1),
                }
            )
            print(json.dumps(cells[-1]), flush=True)
            _write(options.out, {**report, "cells": cells})
    report["tables"] = _table_memory(options.table_blocks)
    _write(options.out, {**report, "cells": cells})
    Path(options.out).with_suffix(".svg").write_text(_plot(cells), encoding="utf-8")
    print(json.dumps({"cells": len(cells), "routing": report.get("routing"), "tables": report["tables"]}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/frontend_sim.json")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the workload; policies were tuned on 1 and 2")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--mixes", nargs="+", default=[*MIXES, RETURNING], choices=[*MIXES, RETURNING])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--kv-gib", type=float, nargs="+", default=[12, 0])
    parser.add_argument("--keep", action="store_true", help="cells of other mixes that the file has stay in it")
    parser.add_argument("--table-blocks", type=int, default=1_000_000)
    parser.add_argument("--profile", help="a machine profile that `moe-prefill calibrate` has written")
    return parser.parse_args()


def _workload(mix: str, options: argparse.Namespace) -> Workload:
    if mix != RETURNING:
        return make_workload(mix, seed=options.seed, scale=options.scale, interval_s=BURST_INTERVAL_S * options.scale)
    high = make_workload("high", seed=options.seed, scale=options.scale)
    passages = [index for index, source in enumerate(high.sources) if source == "quality"]
    kept = [index for part in range(PARTS) for index in passages[part::PARTS]]
    return replace(
        high,
        name=RETURNING,
        requests=[high.requests[index] for index in kept],
        sources=["quality"] * len(kept),
        arrival_s=np.repeat(APART_S * np.arange(PARTS), [len(passages[part::PARTS]) for part in range(PARTS)]),
    )


def _in_parts(outcome: Outcome, tickets: list[Ticket]) -> dict[str, float]:
    """Speed and seconds without the time between one part's last answer and the next part."""
    last = [0.0] * PARTS
    for ticket, latency_s in zip(tickets, outcome.latency_s, strict=True):
        part = round(ticket.arrival_s / APART_S)
        last[part] = max(last[part], float(latency_s))
    return {
        "tokens_per_s": round(sum(ticket.num_tokens for ticket in tickets) / sum(last)),
        "makespan_s": round(sum(last), 2),
    }


def _runs(mix: str, options: argparse.Namespace) -> Iterator[tuple[int, float, str, Callable[[Machine], Policy]]]:
    """Workers, GiB of KV, the policy's name and how to make it: all policies at 8 workers, the aggregated mix at every
    number of workers, bursts and returning prefixes at 2 and 4, all three at every pool size, and ours without each of
    its extensions.
    """
    sizes = [(8, options.kv_gib[0])] if 8 in options.workers else []
    if mix in ("aggregated", "bursts", RETURNING):
        sizes += [(8, kv_gib) for kv_gib in options.kv_gib[1:]]
    if mix == "aggregated":
        sizes += [(workers, options.kv_gib[0]) for workers in options.workers if workers != 8]
    elif mix in ("bursts", RETURNING):  # on fewer workers they come faster than they are computed, or pools are smaller
        sizes += [(workers, options.kv_gib[0]) for workers in options.workers if workers in (2, 4)]
    for workers, kv_gib in sizes:
        for name in options.policies:
            yield workers, kv_gib, name, lambda m, name=name: make_policy(name, m.costs, m.limits)  # type: ignore[misc]
    ablated = [8, 2] if mix in ("bursts", RETURNING) else [8]
    if mix in ABLATED_MIXES and "ours" in options.policies:
        for workers, (name, off) in itertools.product([w for w in ablated if w in options.workers], WITHOUT.items()):
            extensions = Extensions(**off)  # type: ignore[arg-type]
            yield (
                workers,
                options.kv_gib[0],
                f"ours without {name}",
                lambda m, extensions=extensions: Ours(m.costs, m.limits, extensions),  # type: ignore[misc]
            )


_machines: dict[tuple[int, float], Machine] = {}


def _machine(spec: ModelSpec, profile: MachineProfile, workers: int, kv_gib: float) -> Machine:
    """Hosts have up to 8 GPUs, which share the banks."""
    ranks = min(workers, 8)
    if (ranks, kv_gib) not in _machines:
        _machines[ranks, kv_gib] = plan_machine(
            spec,
            profile,
            ranks=ranks,
            kv_gib=kv_gib,
            device_gib=DEVICE_GIB,
            host_gib=HOST_GIB,
            sweep_tokens=SWEEP_TOKENS,
        )
    return _machines[ranks, kv_gib]


def _with_links(profile: MachineProfile) -> MachineProfile:
    """The profile, with estimated rates of the links that one GPU alone could not measure."""
    return replace(profile, transfers={**estimated_profile(profile.gpu).transfers, **profile.transfers})


def _named(profile: MachineProfile) -> dict[str, Any]:
    """Which profile this is: whose shapes were measured, on what, when and how; with the links' rates in bytes/s."""
    keys = ("gpu", "driver", "torch", "date", "command", "model", "is_estimated", "transfers")
    return {key: getattr(profile, key) for key in keys}


def _measured(outcome: Outcome) -> dict[str, Any]:
    return {
        "tokens_per_s": round(outcome.tokens_per_s),
        "saved_fraction": round(outcome.saved_fraction, 5),
        "imbalance": round(outcome.imbalance, 4) if min(outcome.busy_s) else None,  # None: a worker had nothing
        "makespan_s": round(outcome.makespan_s, 2),
        "sweeps": outcome.sweeps,
        "latency_p50_s": round(outcome.latency_quantile_s(0.5), 2),
        "latency_p99_s": round(outcome.latency_quantile_s(0.99), 2),
    }


def _hashed(workload: Workload, spec: ModelSpec) -> tuple[list[Ticket], float]:
    """The requests, hashed, and the seconds that it took."""
    hasher = BlockHasher(MODEL)
    begun = time.process_time()
    tickets = [
        make_ticket(request, hasher, id=index, vocab_size=spec.vocab_size, arrival_s=arrival_s)
        for index, (request, arrival_s) in enumerate(zip(workload.requests, workload.arrival_s.tolist(), strict=True))
    ]
    return tickets, time.process_time() - begun


def _routing_cost(tickets: list[Ticket], machine: Machine, hash_s: float) -> dict[str, Any]:
    """Processor seconds of hashing, of routing (cost model, tables, bookkeeping) and of forming sweeps."""
    frontend = Frontend(
        8, make_policy("ours", machine.costs, machine.limits), machine.costs, machine.bounds, machine.admission
    )
    route_s = form_s = 0.0
    begun = time.process_time()
    for ticket in tickets:
        frontend.submit(ticket)
    while not frontend.idle:
        frontend.route()
        route_s += time.process_time() - begun
        begun = time.process_time()
        sweeps = [frontend.next_sweep(worker, float("inf")) for worker in range(8)]
        form_s += time.process_time() - begun
        begun = time.process_time()
        for sweep in sweeps:
            if sweep is not None:
                frontend.finished(sweep.number)
    route_s += time.process_time() - begun
    tokens, count = sum(ticket.num_tokens for ticket in tickets), len(tickets)
    return {
        "workers": 8,
        "requests": count,
        "hash_s": round(hash_s, 3),
        "route_s": round(route_s, 3),
        "form_s": round(form_s, 3),
        "hashed_tokens_per_s": round(tokens / hash_s),
        "requests_per_s": round(count / (hash_s + route_s)),
        "requests_per_s_with_forming": round(count / (hash_s + route_s + form_s)),
    }


def _table_memory(blocks: int) -> dict[str, Any]:
    """MiB of a table of that many blocks, the digests themselves included."""

    def mib(fill: Callable[[PrefixTable, list[bytes]], None]) -> float:
        tracemalloc.start()
        table = PrefixTable(0)
        fill(table, [index.to_bytes(16, "little") for index in range(blocks)])
        size = tracemalloc.get_traced_memory()[0] / 2**20
        tracemalloc.stop()
        return round(size, 1)

    def commit(table: PrefixTable, digests: list[bytes]) -> None:
        table.committed = OrderedDict.fromkeys(digests)

    return {
        "blocks": blocks,
        "committed_mib": mib(commit),
        "pending_mib": mib(lambda table, digests: table.promise(digests)),
    }


def _write(path: str, report: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# Categorical colours in a fixed order, told apart also by the colour-blind; ours is drawn heavier.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")


def _plot(cells: list[dict[str, Any]]) -> str:
    """Bars: tokens/s of each policy over the best one's, by mix, at 8 workers."""
    cells = [cell for cell in cells if cell["policy"] in POLICIES and cell["workers"] == 8 and cell["kv_gib"] > 0]
    mixes = list(dict.fromkeys(cell["mix"] for cell in cells))
    policies = [name for name in POLICIES if any(cell["policy"] == name for cell in cells)]
    bar, gap, left, top, height = 14, 26, 60, 70, 260
    group = bar * len(policies) + gap
    width = left + group * len(mixes) + 20
    shapes = [
        f'<text x="{left}" y="22" font-size="15">Simulated throughput at 8 workers, relative to the best policy</text>'
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        y = top + height * (1 - tick)
        shapes.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" stroke="#ddd"/>')
        shapes.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for place, name in enumerate(policies):
        x = left + place * 118
        shapes.append(f'<rect x="{x}" y="36" width="12" height="12" fill="{_COLOURS[place]}"/>')
        shapes.append(f'<text x="{x + 17}" y="46">{name}</text>')
    for at, mix in enumerate(mixes):
        rates = {cell["policy"]: cell["tokens_per_s"] for cell in cells if cell["mix"] == mix}
        for place, name in enumerate(policies):
            size = height * rates[name] / max(rates.values())
            x = left + at * group + place * bar + gap / 2
            shapes.append(
                f'<rect x="{x:.1f}" y="{top + height - size:.1f}" width="{bar - 2}" height="{size:.1f}" '
                f'fill="{_COLOURS[place]}"><title>{mix}, {name}: {rates[name]:,} tokens/s</title></rect>'
            )
        middle = left + at * group + group / 2
        shapes.append(f'<text x="{middle:.1f}" y="{top + height + 18}" text-anchor="middle">{mix}</text>')
    body = "\n".join(shapes)
    width = max(width, left + 118 * len(policies))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + height + 34}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
