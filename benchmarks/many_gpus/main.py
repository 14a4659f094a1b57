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

from moe_prefill.bench import Job, report_head, save_report
from moe_prefill.bench.job import long_enough, raw_config
from moe_prefill.config import EngineConfig
from moe_prefill.core import ModelSpec
from moe_prefill.machine import MachineProfile, estimated_profile, load_profile
from moe_prefill.models import spec_from_hf
from moe_prefill.strategies import NAMES

from . import aggregated, measuring, pulls
from .contenders import ASYNCEP
from .forecasts import Forecaster, sides_of, with_ratios
from .plot import figure

PARTS = ("strategies", "aggregated", "pulls", "scaling")
NOTE = "predictions of the cost model, none of them measured"


def main(description: str, *, gpus: int, model: str, quantization: str | None, out: str) -> None:
    """Parse, predict, run, plot. The defaults are those of a script."""
    options = parsed(description, gpus=gpus, model=model, quantization=quantization, out=out)
    # A collective that multicasts in the switch is another machine than the one the copies run on.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are on this host
    config = EngineConfig(
        model=options.model, load_format="dummy", dtype=options.dtype, quantization=options.quantization
    )
    job = Job(name=Path(options.model).name, config=config, cells=tuple(map(str, options.tokens)))
    with long_enough(job) as fitting:
        options.name, options.model, options.precision = job.name, fitting.config.model, job.precision
        spec = spec_from_hf(raw_config(fitting.config))
        run(options, replace(spec, layers=spec.layers[: options.layers or spec.num_layers]))


def run(options: argparse.Namespace, spec: ModelSpec) -> None:
    head = report_head(["python", *sys.argv])
    profile = profile_of(options, head["gpu"])
    forecaster = Forecaster(options, spec, profile)
    few = forecaster.resident_layers() if "scaling" in options.parts else 0
    sides = list(sides_of(options, spec.num_layers, few))
    options.forecasts = {(side, tokens): forecaster.forecast(side, tokens) for side in sides for tokens in side.lengths}
    options.pulls = pulls.forecast(options, profile, spec) if "pulls" in options.parts and options.gpus > 1 else []
    mixes = aggregated.forecast(options, forecaster) if "aggregated" in options.parts else []
    cells = [found.cell for found in options.forecasts.values()] + mixes + options.pulls
    predictions = save_predictions(options, head, profile, cells)
    if options.predict_only:
        plot(options, predictions, "predicted, not measured")
        return
    for gpus, group in groupby(sides, key=lambda side: side.gpus):
        spawn(measuring.run_rank, gpus, list(group), options, head=head)
    if options.pulls:
        spawn(pulls.run_rank, options.gpus, options, head=head, last=(spec,))
    for cell in aggregated.measured(options, spec, mixes):
        save_report(options.out, head, [cell], append=True)
    finish(options, head)


def spawn(work: Any, gpus: int, *arguments: Any, head: dict[str, Any], last: tuple[Any, ...] = ()) -> None:
    """``work(rank, gpus, ...)`` in as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (gpus, *arguments, folder, head, *last), nprocs=gpus)


def finish(options: argparse.Namespace, head: dict[str, Any]) -> None:
    """Ratios and scaling over all cells of the file, and the picture."""
    report = json.loads(options.out.read_text(encoding="utf-8"))
    cells = with_ratios(report["cells"], "tokens_per_s", "ratio")
    alone = {
        (cell["layers"], cell["residency"]): cell["tokens_per_s"]
        for cell in cells
        if cell.get("part") == "scaling" and cell["gpus"] == 1
    }
    for cell in cells:
        if cell.get("part") == "scaling" and cell["gpus"] > 1:
            for residency in ("resident", "auto"):
                if (cell["layers"], residency) in alone:
                    cell[f"over_one_gpu_{residency}"] = cell["tokens_per_s"] / alone[cell["layers"], residency]
    save_report(options.out, {**head, "refused": report.get("refused", [])}, cells)
    plot(options, cells, f"{head['gpu']}, {head['date']}")


def plot(options: argparse.Namespace, cells: list[dict[str, Any]], what: str) -> None:
    path = predicted_path(options.out) if options.predict_only else options.out
    path.with_suffix(".svg").write_text(figure(cells, f"asyncep and the baselines, {what}"), encoding="utf-8")


def predicted_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}_predicted.json")


def save_predictions(
    options: argparse.Namespace, head: dict[str, Any], profile: MachineProfile, cells: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Written before anything runs, beside those for other models and numbers of GPUs; all that the file then has."""
    path, mine = predicted_path(options.out), with_ratios(cells, "predicted_tokens_per_s", "predicted_ratio")
    kept: list[dict[str, Any]] = []
    if path.exists():
        new = {(cell["model"], cell["part"], cell["gpus"]) for cell in mine}
        old = json.loads(path.read_text(encoding="utf-8"))["predictions"]
        kept = [cell for cell in old if (cell["model"], cell["part"], cell["gpus"]) not in new]
    about = {"note": NOTE, "for": profile.gpu, "rates": "estimated" if profile.is_estimated else profile.date}
    memory = {"assumed_hbm_gib": options.assumed_hbm_gib, "assumed_host_gib": options.assumed_host_gib}
    mine = [{**cell, "command": head["command"]} for cell in mine]
    head = {key: head[key] for key in ("date", "git")}
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {**about, **memory, **head, "predictions": kept + mine}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{len(mine)} predictions -> {path}", flush=True)
    return kept + mine


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


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


def parsed(description: str, *, gpus: int, model: str, quantization: str | None, out: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path(out))
    add("--gpus", type=int, default=gpus)
    add("--parts", type=words, default=list(PARTS), help=", ".join(PARTS))
    add("--predict-only", action="store_true", help="write the predictions and end; needs no GPU")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--gpu", default="H200", help="whose datasheet is predicted from, without a measured profile")
    add("--profile", type=Path, default=None, help="rates measured before, instead of now")
    add("--estimated", action="store_true", help="predict from the datasheet, without calibrating")
    add("--model", default=model)
    add("--layers", type=int, default=None, help="reduced depth: at least 24 (BF16) or 40 (FP8)")
    add("--dtype", default="bfloat16")
    add("--quantization", choices=("fp8",), default=quantization)
    add("--skews", type=floats, default=[1.0, 16.0])
    add("--strategies", type=words, default=[ASYNCEP, *NAMES])
    add("--residencies", type=words, default=["sharded", "hybrid"], help="of asyncep")
    add("--transport", choices=("copy-engine", "nccl"), default="copy-engine", help="of asyncep, sharded")
    add("--tokens", type=numbers, default=[256, 4096, 32768, 131072])
    add("--sweeps", type=numbers, default=[65536, 131072])
    add("--chunks", type=numbers, default=[16384, 32768, 65536])
    add("--micro-batches", type=numbers, default=[4, 8])
    add("--search", type=int, default=2, help="settings that are tried, those predicted to be best")
    add("--run-tokens", type=int, default=131072, help="tokens a GPU in one run")
    add("--warm-up", type=int, default=3, help="runs at most, until two agree within 2%%")
    add("--seconds", type=float, default=0.0, help="of timed runs, at least")
    add("--least-runs", type=int, default=3)
    add("--pulls-a-run", type=int, default=20)
    add("--scale", type=float, default=0.1, help="part of the aggregated workload's requests")
    add("--hbm-gib", type=float, default=None)
    add("--host-gib", type=float, default=None)
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    options.assumed_hbm_gib = options.hbm_gib or 139.0
    options.assumed_host_gib = options.host_gib or 512.0
    return options
