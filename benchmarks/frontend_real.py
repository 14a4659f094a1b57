"""The frontend over real workers, beside what the simulator says: its gain, and that of the pool of prefixes.

    python benchmarks/frontend_real.py  # two CPU workers, the demo model: about 15 minutes of two quiet cores
    python benchmarks/frontend_real.py --scale 0.002 --repeats 1 --policies ours --out /tmp/small.json
    python benchmarks/frontend_real.py --device cuda --gpus 2 --model Qwen3-30B-A3B --scale 0.3 --sweep-tokens 65536

The machine's rates are measured first (``--profile`` takes earlier ones): on a CPU in as many processes at once as
there will be workers, with as many threads each, since they share its memory. A measured figure is the median of
``--repeats`` runs after some to warm up, until two agree within 5% (products of a new shape are compiled first, on a
GPU for up to a minute); ``ratio`` is simulated over measured, and the simulator gets the machine that the frontend
believes in. ``pace``: what the last sweeps of the warm-up took over what was predicted of them; ``ratio_at_pace`` is
the ratio with the prediction corrected by it, as the frontend corrects its own.

Cells of the kind ``policy``: the aggregated workload, all at once, by each policy with the same sweeps. Cells of the
kind ``pool``: questions about long passages, handed in in ``parts``, each when the one before is answered, so that
every passage comes back in later sweeps; with a pool of prefixes on each worker, and without.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_prefill.blocks import BlockHasher
from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest, RunStats
from moe_prefill.frontend import POLICIES, Machine, make_policy, make_ticket
from moe_prefill.models import preset_names
from moe_prefill.simulate import Outcome, simulate
from moe_prefill.workers import RoutedEngine, Routing
from moe_prefill.workloads import MIXES, Workload, make_workload

DEMO = "examples/demo_model/checkpoint"
MOST_WARM_UPS, AGREE = 4, 0.05


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as directory:
        profile = options.profile or _calibrated(options, Path(directory))
        config = EngineConfig(
            model=options.model,
            device=options.device,
            gpus=options.gpus,
            load_format="dummy" if options.model in preset_names() else "safetensors",
            quantization=options.quantization,
            threads=options.threads,
            max_sweep_tokens=options.sweep_tokens,
            profile=profile,
        )
        cells = []
        for run in _runs(config, options):
            cells.append(_cell(run, options))
            print(json.dumps(cells[-1]), flush=True)
            _write(options, cells)
    cells = _with_gains(cells)
    _write(options, cells)
    for cell in cells:
        gains = {name: value for name, value in cell.items() if "_over_" in name}
        print(cell["kind"], cell["policy"], f"{cell['kv_gib']:.3g} GiB", f"simulated/measured {cell['ratio']}", gains)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/frontend_real.json")
    parser.add_argument("--model", default=DEMO, help="a directory, a hub id, or a preset's name for dummy weights")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--gpus", type=int, default=2, help="worker processes")
    parser.add_argument("--threads", type=int, default=1, help="of each worker on a CPU")
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--sweep-tokens", type=int, default=16384)
    parser.add_argument("--mix", default="aggregated", choices=MIXES)
    parser.add_argument("--scale", type=float, default=0.018, help="part of the workload's requests")
    parser.add_argument("--policies", nargs="+", default=["ours", "round-robin", "vllm"], choices=POLICIES)
    parser.add_argument("--pool-gib", type=float, default=0.25, help="of each worker, for the cells of the pool")
    parser.add_argument("--pool-scale", type=float, default=0.15, help="part of the questions about passages")
    parser.add_argument("--pool-parts", type=int, default=6, help="in which they are handed in; 0: no such cells")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", help="rates that were measured before")
    return parser.parse_args()


def _calibrated(options: argparse.Namespace, directory: Path) -> str:
    """Measure the machine as the workers will use it; the profile's path."""
    processes = []
    for rank in range(options.gpus if options.device == "cpu" else 1):
        command = [sys.executable, "-m", "moe_prefill.cli", "calibrate", "--model", options.model]
        command += ["--device", options.device, "--output", str(directory / f"{rank}.json")]
        command += ["--threads", str(options.threads)] if options.device == "cpu" else []
        command += ["--quantization", options.quantization] if options.quantization else []
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("calibration failed")
    return str(directory / "0.json")


@dataclass(frozen=True)
class Run:
    """What one cell measures; ``workload`` is made to fit the model's context."""

    kind: str
    config: EngineConfig
    policy: str
    workload: Workload
    parts: int = 1


def _runs(config: EngineConfig, options: argparse.Namespace) -> Iterator[Run]:
    workload = make_workload(options.mix, scale=options.scale)
    for policy in options.policies:
        yield Run("policy", config, policy, workload)
    if options.pool_parts:
        passages = _only(make_workload("high", scale=options.pool_scale), "quality")
        for kv_gib in (options.pool_gib, 0.0):
            yield Run("pool", replace(config, kv_gib=kv_gib), "ours", passages, options.pool_parts)


def _only(workload: Workload, source: str) -> Workload:
    kept = [index for index, name in enumerate(workload.sources) if name == source]
    return replace(
        workload,
        name=source,
        requests=[workload.requests[index] for index in kept],
        sources=[source] * len(kept),
        arrival_s=workload.arrival_s[kept],
    )


def _cell(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Measured over real workers, and simulated."""
    with closing(RoutedEngine(run.config, Routing(policy=run.policy))) as engine:
        limits = engine.limits
        workload = run.workload.fitted(limits.max_request_tokens, limits.vocab_size)
        parts = [workload.requests[part :: run.parts] for part in range(run.parts)]
        _warm_up(engine, parts)
        pace = engine.pace
        measured = [_measured(engine, parts, str(repeat)) for repeat in range(options.repeats)]
        simulated_s, outcome = _simulated(engine.machine, parts, run.policy, options.gpus)
    seconds = sorted(seconds for seconds, _ in measured)
    stats, tokens = measured[-1][1], workload.num_tokens
    ratio = statistics.median(seconds) / simulated_s
    return {
        "kind": run.kind,
        "model": options.model,
        "mix": workload.name,
        "requests": len(workload.requests),
        "parts": run.parts,
        "tokens": tokens,
        "workers": options.gpus,
        "policy": run.policy,
        "kv_gib": limits.kv_gib,
        "sweep_tokens": limits.max_sweep_tokens,
        "simulated_tokens_per_s": round(tokens / simulated_s),
        "measured_tokens_per_s": round(tokens / statistics.median(seconds)),
        "measured_spread": [round(tokens / each) for each in reversed(seconds)],
        "ratio": round(ratio, 4),
        "pace": round(pace, 4),
        "ratio_at_pace": round(ratio / pace, 4),
        "simulated_saved_fraction": round(outcome.saved_fraction, 4),
        "measured_saved_fraction": round(stats.saved_tokens / stats.prompt_tokens, 4),
        "simulated_sweeps": outcome.sweeps,
        "measured_sweeps": stats.sweeps,
    }


def _warm_up(engine: RoutedEngine, parts: Sequence[Sequence[AtomicRequest]]) -> None:
    """Runs until two agree, or until there were enough of them."""
    last = 0.0
    for number in range(MOST_WARM_UPS):
        seconds, _ = _measured(engine, parts, f"warm-up {number}")
        if abs(seconds - last) <= AGREE * seconds:
            return
        last = seconds


def _measured(engine: RoutedEngine, parts: Sequence[Sequence[AtomicRequest]], salt: str) -> tuple[float, RunStats]:
    """Seconds from handing the first part in to the last answer, and the work done: as if nothing of the requests had
    been computed before.
    """
    salted = [[replace(request, salt=salt) for request in part] for part in parts]
    before, begun = engine.stats, time.perf_counter()
    for part in salted:
        failed = [answer for answer in engine.score(part) if isinstance(answer, Exception)]
        assert not failed, failed[0]
    return time.perf_counter() - begun, engine.stats - before


def _simulated(
    machine: Machine, parts: Sequence[Sequence[AtomicRequest]], policy: str, workers: int
) -> tuple[float, Outcome]:
    """Seconds, the time between parts left out, and all of what happened: parts come so far apart that each meets idle
    workers.
    """
    hasher, apart_s = BlockHasher("simulated"), 1e6
    part_of = [part for part, requests in enumerate(parts) for _ in requests]
    tickets = [
        make_ticket(request, hasher, id=id, vocab_size=machine.spec.vocab_size, arrival_s=apart_s * part)
        for id, (part, request) in enumerate(zip(part_of, itertools.chain(*parts), strict=True))
    ]
    outcome = simulate(tickets, machine, workers, make_policy(policy, machine.costs, machine.limits))
    last_s = [0.0] * len(parts)
    for part, latency_s in zip(part_of, outcome.latency_s, strict=True):
        last_s[part] = max(last_s[part], latency_s)
    return sum(last_s), outcome


def _with_gains(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much faster ours is than the other policies, and with the pool than without, both ways."""

    def gains(cell: dict[str, Any], base: dict[str, Any], name: str) -> dict[str, float]:
        ways = ("simulated", "measured")
        return {
            f"{way}_over_{name}": round(cell[rate] / base[rate], 4) for way in ways for rate in [f"{way}_tokens_per_s"]
        }

    found = []
    for cell in cells:
        gained: dict[str, float] = {}
        for base in cells:
            if base["kind"] == cell["kind"] == "policy" and cell["policy"] == "ours" != base["policy"]:
                gained |= gains(cell, base, base["policy"])
            if base["kind"] == cell["kind"] == "pool" and cell["kv_gib"] > base["kv_gib"] == 0:
                gained |= gains(cell, base, "no pool")
        found.append({**cell, **gained})
    return found


def _write(options: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "git": git.stdout.strip(),
        "torch": torch.__version__,
    }
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    else:
        about["cpu"] = f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {options.threads} thread(s) a worker"
    Path(options.out).write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n", encoding="utf-8")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
