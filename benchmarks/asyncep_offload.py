"""Expert banks streamed from host memory on one GPU, beside resident ones and beside the cost model's prediction.

    python benchmarks/asyncep_offload.py --out benchmarks/results/asyncep_offload.json

``30b``: Qwen3-30B-A3B in BF16 with its device memory capped, so that nearly all banks stream, at 0.4, 0.7 and 1.0 of T,
against the same engine with resident banks; the rates that T and the prediction come from are measured first, in the
same run. ``235b``: all layers of Qwen3-235B-A22B in FP8 on one GPU; the slowdown by streaming is measured on as many
layers as fit resident. Dummy weights; the last layer runs in full; sweeps follow one another, and the median of the
times from one sweep's begin to the next one's counts, the first sweeps apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_prefill.calibrate import calibrate
from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.costmodel import Batch, Streaming, predict_sweep, saturation
from moe_prefill.engine import LocalEngine, build_engine, peak_bytes
from moe_prefill.engine.build import pick_device
from moe_prefill.engine.load import open_model
from moe_prefill.machine import MachineProfile, save_profile
from moe_prefill.residency import bank_bytes

GIB = 1 << 30
COMMAND = "python " + " ".join(sys.argv)


def requests_of(engine: LocalEngine, tokens: int, count: int, seed: int) -> list[AtomicRequest]:
    ids = np.random.default_rng(seed).integers(0, engine.spec.vocab_size, (count, tokens), dtype=np.int32)
    return [AtomicRequest.candidates(row, [11, 17]) for row in ids]


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Medians over sweeps that follow one another, ms, and true FLOPs of one."""

    sweep_ms: float
    exposed_ms: float
    exposed_first_ms: float
    first_sweep_ms: float
    flops: float
    sweeps: int

    @property
    def compute_ms(self) -> float:
        return self.sweep_ms - self.exposed_ms


def timed(engine: LocalEngine, requests: Sequence[AtomicRequest], seconds: float) -> Timing:
    """Sweeps of the same requests, one after the other; two warm up."""

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in engine.compute(itertools.repeat(list(requests), count)):
            pass
        return time.perf_counter() - start

    first = run(1)
    engine.transfers.clear()
    before = engine.stats.flops
    count = max(7 if first < 20 else 4, min(200, int(seconds / first)))
    run(count)
    flops = (engine.stats.flops - before) / count
    kept = list(engine.transfers)
    steps = [after.begin_ms - sweep.begin_ms for sweep, after in itertools.pairwise(kept)][1:]
    steady = kept[2:]
    return Timing(
        statistics.median(steps),
        statistics.median(sweep.exposed_ms for sweep in steady),
        statistics.median(sweep.exposed_first_ms for sweep in steady),
        1e3 * first,
        flops,
        len(steps),
    )


def cell_of(engine: LocalEngine, timing: Timing, tokens: int, count: int, **more: Any) -> dict[str, Any]:
    per_second = 1e3 * tokens * count / timing.sweep_ms
    return {
        "model": more.pop("model"),
        "layers": engine.spec.num_layers,
        "precision": more.pop("precision"),
        "tokens": tokens,
        "requests": count * timing.sweeps,
        "sweep_tokens": tokens * count,
        "strategy": "asyncep",
        "tokens_per_s": per_second,
        "mfu": 1e3 * timing.flops / timing.sweep_ms / (engine.peak_flops or float("nan")),
        "sweep_ms": timing.sweep_ms,
        "exposed_ms": timing.exposed_ms,
        "exposed_first_ms": timing.exposed_first_ms,
        "first_sweep_ms": timing.first_sweep_ms,
        "peak_hbm_gib": peak_bytes(pick_device("auto")) / GIB,
        "command": COMMAND,
        **more,
    }


def build(config: dict[str, Any]) -> tuple[LocalEngine, list[str | None], int]:
    """An engine, its levels and its bank buffers."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    engine = build_engine(EngineConfig(load_format="dummy", dtype="bfloat16", prune_last=False, **config))
    plan = engine.residency
    assert plan is not None
    print(f"built {config['model']} in {time.perf_counter() - start:.1f} s: {residency_of(plan.levels)}, {plan.sweep}")
    return engine, list(plan.levels), plan.bank_buffers


def residency_of(levels: Sequence[str | None]) -> str:
    return ", ".join(f"{levels.count(level)} {level}" for level in dict.fromkeys(levels) if level)


def measure_profile(model: str, float8: bool, save: Path | None) -> MachineProfile:
    start = time.perf_counter()
    spec, _ = open_model(model, "dummy", None)
    profile = calibrate(spec, pick_device("auto"), torch.bfloat16, model=model, command=COMMAND, float8=float8)
    print(f"calibrated {model} in {time.perf_counter() - start:.1f} s, host {profile.transfers['host'] / 1e9:.1f} GB/s")
    if save is not None:
        save_profile(profile, save)
    return profile


def small_model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Qwen3-30B-A3B with capped memory against itself resident."""
    model, tokens = "Qwen3-30B-A3B", 2048
    profile = measure_profile(model, False, options.profile)
    spec, _ = open_model(model, "dummy", None)
    capped = {"model": model, "memory_gib": options.hbm_gib, "host_gib": options.host_gib}
    bank = bank_bytes(spec, "bfloat16")

    def streaming(levels: Sequence[str | None], buffers: int) -> dict[str, Any]:
        return {"precision": "bfloat16", "streaming": Streaming(levels=tuple(levels), bank_bytes=bank, depth=buffers)}

    def threshold(levels: Sequence[str | None], buffers: int) -> int:
        stream = streaming(levels, buffers)
        found = saturation(spec, profile, **stream, tokens_per_request=tokens, prune_last=False)
        print(f"T {found.flops:.3g} FLOPs, {found.tokens:,} tokens; t_paper {found.t_paper:.3g}; {found.window}")
        return -(-found.tokens // tokens) * tokens

    # T depends on the levels and the levels on the sweep: nearly all banks stream, so one round is enough.
    at_t = threshold(["offloaded"] * spec.num_layers, 2)
    engine, levels, buffers = build(capped | {"max_sweep_tokens": at_t})
    cells, answers = [], None
    for part in (0.4, 0.7, 1.0):
        count = max(1, round(part * at_t / tokens))
        requests = requests_of(engine, tokens, count, seed=1)
        timing = timed(engine, requests, options.seconds)
        batch = Batch.uniform(tokens * count, tokens, prune_last=False)
        predicted = predict_sweep(spec, batch, profile, **streaming(levels, buffers))
        extra = {
            "part_of_t": part,
            "predicted_sweep_ms": 1e3 * predicted.sweep_s,
            "predicted_over_measured": 1e3 * predicted.sweep_s / timing.sweep_ms,
            "predicted_exposed_ms": 1e3 * predicted.exposed_s,
        }
        where = {"transport": "host", "residency": residency_of(levels), "hbm_gib": options.hbm_gib}
        host = {"host_gib": levels.count("offloaded") * bank / GIB}
        cells.append(cell_of(engine, timing, tokens, count, model=model, precision="bf16", **where, **host, **extra))
        print(json.dumps(cells[-1]), flush=True)
        answers = np.stack([result.logits for result in engine.score(requests)])
    engine.close()
    del engine
    torch.cuda.empty_cache()
    engine, levels, _ = build({"model": model, "max_sweep_tokens": at_t, "residency": "resident"})
    for cell in list(cells):
        count = cell["sweep_tokens"] // tokens
        requests = requests_of(engine, tokens, count, seed=1)
        timing = timed(engine, requests, options.seconds)
        resident = cell_of(engine, timing, tokens, count, model=model, precision="bf16", residency="resident")
        batch = Batch.uniform(tokens * count, tokens, prune_last=False)
        predicted = predict_sweep(spec, batch, profile, precision="bfloat16")
        resident["predicted_over_measured"] = 1e3 * predicted.sweep_s / timing.sweep_ms
        cell["resident_tokens_per_s"] = resident["tokens_per_s"]
        cell["over_resident"] = cell["tokens_per_s"] / resident["tokens_per_s"]
        cell["slowdown"] = (cell["sweep_ms"] - cell["exposed_ms"]) / resident["sweep_ms"]
        cell["slowdown_layers"] = engine.spec.num_layers
        cells.append(resident)
        print(json.dumps(resident), flush=True)
    same = np.stack([result.logits for result in engine.score(requests)])
    cells[2]["bit_identical_to_resident"] = bool(np.array_equal(same, answers))
    engine.close()
    return cells


def large_model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All of Qwen3-235B-A22B on one GPU, and the slowdown of streaming on the layers that fit resident."""
    model, tokens = "Qwen3-235B-A22B", 4096
    fp8 = {"model": model, "quantization": "fp8"}
    count = options.large_tokens // tokens
    whole = fp8 | {"host_gib": options.host_gib, "max_sweep_tokens": options.large_tokens}
    engine, levels, _ = build(whole)
    timing = timed(engine, requests_of(engine, tokens, count, seed=2), options.seconds)
    where = {"transport": "host", "residency": residency_of(levels)}
    host = levels.count("offloaded") * bank_bytes(engine.spec, "float8_e4m3fn") / GIB
    cell = cell_of(engine, timing, tokens, count, model=model, precision="fp8", host_gib=host, **where)
    print(json.dumps(cell), flush=True)
    engine.close()
    del engine
    torch.cuda.empty_cache()
    layers = options.slowdown_layers
    # One after the other as in the whole model; the last ones resident, since a sweep's end hides nothing.
    pattern = ["resident", "offloaded"] * (layers // 2) + ["resident"] * (layers % 2)
    times = {}
    for name, residency in (("streamed", ",".join(pattern)), ("resident", "resident")):
        part = {"residency": residency, "num_layers": layers, "max_sweep_tokens": options.large_tokens}
        engine, _, _ = build(fp8 | {"host_gib": options.host_gib} | part)
        times[name] = timed(engine, requests_of(engine, tokens, count, seed=2), options.seconds / 2)
        print(name, times[name], flush=True)
        if name == "resident":
            resident = cell_of(engine, times[name], tokens, count, model=model, precision="fp8", residency="resident")
        engine.close()
        del engine
        torch.cuda.empty_cache()
    cell["slowdown"] = times["streamed"].compute_ms / times["resident"].compute_ms
    cell["slowdown_layers"] = layers
    cell["exposed_share"] = cell["exposed_ms"] / cell["sweep_ms"]
    cell["resident_tokens_per_s"] = resident["tokens_per_s"] * layers / cell["layers"]  # of a model of all layers
    return [cell, resident]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="30b,235b")
    parser.add_argument("--hbm-gib", type=float, default=16.0)
    parser.add_argument("--host-gib", type=float, default=112.0)
    parser.add_argument("--large-tokens", type=int, default=65536)
    parser.add_argument("--slowdown-layers", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--profile", type=Path, default=None, help="keep the measured rates here")
    options = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "command": COMMAND,
        "git": git.stdout.strip(),
        "torch": torch.__version__,
        "cells": [],
    }
    for part, measure in (("30b", small_model), ("235b", large_model)):
        if part in options.parts.split(","):
            report["cells"] += measure(options)
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
