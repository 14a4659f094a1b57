"""The command line that the scripts share, and the order of things: predictions are written before anything runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from moe_prefill.bench import Job, cell_identity, check_peer, report_head, save_report
from moe_prefill.bench.job import long_enough, raw_config
from moe_prefill.config import EngineConfig
from moe_prefill.core import ModelSpec
from moe_prefill.machine import MachineProfile, estimated_profile, load_profile
from moe_prefill.models import spec_from_hf

from . import aggregated, comparisons, measuring, peer, pulls, tiers
from .duration import call_s
from .forecasts import Forecaster, with_ratios
from .options import parsed
from .plot import figure
from .sides import sides_of

NOTE = "predictions of the cost model, none of them measured"


def main(description: str, *, gpus: int, model: str, quantization: str | None, out: str) -> None:
    """Parse, predict, run, plot. The defaults are those of a script."""
    options = parsed(description, gpus=gpus, model=model, quantization=quantization, out=out)
    if "vllm" in options.parts and not options.predict_only:
        check_peer("vllm", options.peer_site)
    # A collective that multicasts in the switch is another machine than the one the copies run on.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are on this host
    config = EngineConfig(
        model=options.model, load_format="dummy", dtype=options.dtype, quantization=options.quantization
    )
    lengths = [n for n in options.tokens if isinstance(n, int)] + options.mixed
    job = Job(name=Path(options.model).name, config=config, cells=tuple(map(str, lengths)))
    with long_enough(job) as fitting:
        options.name, options.model, options.precision = job.name, fitting.config.model, job.precision
        spec = spec_from_hf(raw_config(fitting.config))
        run(options, replace(spec, layers=spec.layers[: options.layers or spec.num_layers]))


def run(options: argparse.Namespace, spec: ModelSpec) -> None:
    head = report_head(["python", *sys.argv])
    profile = options.machine_profile = profile_of(options, head["gpu"])
    options.depth = spec.num_layers
    forecaster = Forecaster(options, spec, profile)
    few = forecaster.resident_layers() if "scaling" in options.parts else 0
    moved = ("copy-engine", "nccl") if "transports" in options.parts and options.gpus > 1 else ()
    sides = sides_of(
        options, spec.num_layers, few, {by: forecaster.threshold(by, options.threshold_length) for by in moved}
    )
    options.forecasts = {(side, length): forecaster.forecast(side, length) for side in sides for length in side.lengths}
    options.pulls = pulls.forecast(options, profile, spec) if "pulls" in options.parts and options.gpus > 1 else []
    mixes = aggregated.forecast(options, forecaster) if "aggregated" in options.parts else []
    peers = peer.forecast(options, forecaster) if "vllm" in options.parts else []
    seconds = call_s(options, forecaster, options.forecasts, mixes, peers)
    cells = [found.cell for found in options.forecasts.values()] + mixes + options.pulls + peers
    predictions = save_predictions(options, head, profile, cells, seconds)
    if options.predict_only:
        plot(options, predictions, "predicted, not measured")
        return
    for gpus, group in groupby(sides, key=lambda side: side.gpus):
        spawn(measuring.run_rank, gpus, list(group), options, head=head)
    measure_peers(options, head, spec, peers)
    if options.pulls:
        spawn(pulls.run_rank, options.gpus, options, head=head, last=(spec,))
    measure_tiers(options, head, spec, mixes)
    finish(options, head)


def measure_tiers(
    options: argparse.Namespace, head: dict[str, Any], spec: ModelSpec, mixes: list[dict[str, Any]]
) -> None:
    """The aggregated workload, each tier saved when it is done."""
    head = {**head, "refused": measuring.refusals(options.out, [])}
    for cell in tiers.measured(options, spec, mixes):
        save_report(options.out, head, [cell], append=True)
    in_ranks = [cell for cell in mixes if "refused" not in cell and aggregated.Tier.of(cell).in_ranks]
    if in_ranks:
        in_ranks.sort(key=lambda cell: cell["strategy"])  # weights are loaded once for each
        spawn(tiers.run_rank, options.gpus, options, head=head, last=(in_ranks,))


def measure_peers(
    options: argparse.Namespace, head: dict[str, Any], spec: ModelSpec, peers: list[dict[str, Any]]
) -> None:
    if not peers:
        return
    for cells, why in peer.measured(options, peer.side_of(options, spec.num_layers), peers):
        refused = measuring.refusals(options.out, [why] if why else [])
        save_report(options.out, {**head, "refused": refused}, cells, append=True)


def spawn(work: Any, gpus: int, *arguments: Any, head: dict[str, Any], last: tuple[Any, ...] = ()) -> None:
    """``work(rank, gpus, ...)`` in as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (gpus, *arguments, folder, head, *last), nprocs=gpus)


def finish(options: argparse.Namespace, head: dict[str, Any]) -> None:
    """Ratios and scaling over all cells of the file, and the picture."""
    report = json.loads(options.out.read_text(encoding="utf-8"))
    cells = with_ratios(report["cells"], "tokens_per_s", "ratio")
    cells = peer.with_peers(cells, "peer_tokens_per_s", "tokens_per_s", "ratio")
    cells = comparisons.with_envelope(comparisons.with_scaling(cells), "tokens_per_s", "over_uncapped")
    options.out.write_text(json.dumps({**report, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    plot(options, cells, f"{head['gpu']}, {head['date']}")


def plot(options: argparse.Namespace, cells: list[dict[str, Any]], what: str) -> None:
    path = predicted_path(options.out) if options.predict_only else options.out
    path.with_suffix(".svg").write_text(figure(cells, f"asyncep and the baselines, {what}"), encoding="utf-8")


def predicted_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}_predicted.json")


def save_predictions(
    options: argparse.Namespace,
    head: dict[str, Any],
    profile: MachineProfile,
    cells: list[dict[str, Any]],
    seconds: float,
) -> list[dict[str, Any]]:
    """Written before anything runs, beside those of other calls, which stay; all that the file then has. ``seconds``:
    that the call should take.
    """
    path, kept, calls = predicted_path(options.out), list[dict[str, Any]](), dict[str, float]()
    mine = [{**cell, "command": head["command"]} for cell in cells]
    if path.exists():
        new, old = {cell_identity(cell) for cell in mine}, json.loads(path.read_text(encoding="utf-8"))
        kept = [cell for cell in old["predictions"] if cell_identity(cell) not in new]
        calls = old["predicted_call_s"]
    every = with_ratios(kept + mine, "predicted_tokens_per_s", "predicted_ratio")
    every = peer.with_peers(every, "predicted_peer_tokens_per_s", "predicted_tokens_per_s", "predicted_ratio")
    every = comparisons.with_envelope(every, "predicted_tokens_per_s", "predicted_over_uncapped")
    about = {"note": NOTE, "for": profile.gpu, "rates": "estimated" if profile.is_estimated else profile.date}
    memory = {"assumed_hbm_gib": options.assumed_hbm_gib, "assumed_host_gib": options.assumed_host_gib}
    when = {key: head[key] for key in ("date", "git")}
    calls = {**calls, head["command"].replace(" --predict-only", ""): round(seconds)}
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {**about, **memory, **when, "predicted_call_s": calls, "predictions": every}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{len(mine)} predictions -> {path}; this call should take {seconds:.0f} s", flush=True)
    return every


def profile_of(options: argparse.Namespace, gpu: str) -> MachineProfile:
    """The rates that are predicted with: given, measured now, or of a datasheet where nothing is to run."""
    options.profile_path = None
    if options.profile is not None:
        options.profile_path = str(options.profile)
        return load_profile(options.profile)
    if options.predict_only or options.device == "cpu" or options.estimated:
        return estimated_profile("cpu" if options.device == "cpu" else options.gpu)
    start = time.perf_counter()
    path = options.out.with_name(f"profile_{gpu}_{options.name}_{options.precision}.json".replace(" ", "_").lower())
    command = ["calibrate", "--model", options.model, "--dtype", options.dtype, "--output", str(path)]
    command += ["--quantization", options.quantization] if options.quantization else []
    subprocess.run([sys.executable, "-m", "moe_prefill.cli", *command], check=True, timeout=300)
    print(f"calibrated: {time.perf_counter() - start:.0f} s, {path}", flush=True)
    options.profile_path = str(path)
    return load_profile(path)
