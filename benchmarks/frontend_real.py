"""The frontend over real workers: tokens/s of each policy on the aggregated workload, beside what the simulator says.

    python benchmarks/frontend_real.py  # two CPU workers, the demo model: about 20 minutes of two cores
    python benchmarks/frontend_real.py --scale 0.002 --repeats 1 --policies ours --out /tmp/small.json
    python benchmarks/frontend_real.py --device cuda --gpus 2 --model Qwen3-30B-A3B --scale 0.3 --sweep-tokens 65536

The machine's rates are measured first (``--profile`` takes earlier ones): on a CPU in as many processes at once as
there will be workers, with as many threads each, since they share its memory. Every policy gets the same requests, all
at once, and the same sweeps; the simulator gets the machine that the frontend believes in. A measured figure is the
median of ``--repeats`` runs after one to warm up (products of a new shape are compiled first); ``ratio`` is simulated
over measured. ``pace``: what the last sweeps of the warm-up took over what was predicted of them; ``ratio_at_pace`` is
the ratio with the prediction corrected by it, as the frontend corrects its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
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
from moe_prefill.workloads import MIXES, make_workload

DEMO = "examples/demo_model/checkpoint"


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
        for policy in options.policies:
            cells.append(_cell(config, policy, options))
            print(json.dumps(cells[-1]), flush=True)
            _write(options, cells)
    _write(options, _with_gains(cells))


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
    parser.add_argument("--scale", type=float, default=0.03, help="part of the workload's requests")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
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


def _cell(config: EngineConfig, policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """One policy: measured over real workers, and simulated."""
    with closing(RoutedEngine(config, Routing(policy=policy))) as engine:
        limits = engine.limits
        workload = make_workload(options.mix, scale=options.scale).fitted(limits.max_request_tokens, limits.vocab_size)
        engine.score(_salted(workload.requests, "warm-up"))
        pace = engine.pace
        runs = [_run(engine, _salted(workload.requests, str(repeat))) for repeat in range(options.repeats)]
        outcome = _simulated(engine.machine, workload.requests, policy, options.gpus)
    measured_s = statistics.median(seconds for seconds, _ in runs)
    stats = runs[-1][1]
    measured, simulated = workload.num_tokens / measured_s, outcome.tokens_per_s
    return {
        "model": options.model,
        "mix": options.mix,
        "requests": len(workload.requests),
        "tokens": workload.num_tokens,
        "workers": options.gpus,
        "policy": policy,
        "sweep_tokens": limits.max_sweep_tokens,
        "simulated_tokens_per_s": round(simulated),
        "measured_tokens_per_s": round(measured),
        "measured_spread": [round(workload.num_tokens / seconds) for seconds, _ in sorted(runs, reverse=True)],
        "ratio": round(simulated / measured, 4),
        "pace": round(pace, 4),
        "ratio_at_pace": round(simulated / pace / measured, 4),
        "simulated_saved_fraction": round(outcome.saved_fraction, 4),
        "measured_saved_fraction": round(stats.saved_tokens / stats.prompt_tokens, 4),
        "simulated_sweeps": outcome.sweeps,
        "measured_sweeps": stats.sweeps,
    }


def _run(engine: RoutedEngine, requests: list[AtomicRequest]) -> tuple[float, RunStats]:
    """Seconds from handing everything in to the last answer, and the work done."""
    before, begun = engine.stats, time.perf_counter()
    answers = engine.score(requests)
    seconds = time.perf_counter() - begun
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert not failed, failed[0]
    return seconds, engine.stats - before


def _simulated(machine: Machine, requests: Any, policy: str, workers: int) -> Outcome:
    hasher = BlockHasher("simulated")
    tickets = [
        make_ticket(request, hasher, id=index, vocab_size=machine.spec.vocab_size)
        for index, request in enumerate(requests)
    ]
    return simulate(tickets, machine, workers, make_policy(policy, machine.costs, machine.limits))


def _salted(requests: Any, salt: str) -> list[AtomicRequest]:
    """The same requests as if nothing of them had been computed before."""
    return [replace(request, salt=salt) for request in requests]


def _with_gains(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much faster each policy is than round robin, both ways."""
    base = next((cell for cell in cells if cell["policy"] == "round-robin"), None)
    if base is None:
        return cells
    names = ("simulated_tokens_per_s", "measured_tokens_per_s")
    gains = {name.removesuffix("_tokens_per_s") + "_over_round_robin": name for name in names}
    return [{**cell, **{gain: round(cell[name] / base[name], 4) for gain, name in gains.items()}} for cell in cells]


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
