"""Throughput of Qwen3 MoE models on one Hopper GPU: BF16 and FP8, requests of 256 to 131,072 tokens, beside the
predicted figures, and beside vLLM and transformers.

    python benchmarks/hopper.py --parts 30b-bf16,30b-fp8 --out benchmarks/results/hopper.json

First the machine is calibrated for the shapes of each model (under a minute; ``--profile`` names an earlier result,
``--estimated`` leaves it out), and the predictions beside the measurements come from that; the profile is kept beside
the results. Each part is a process of its own and fits in ten minutes. The result file keeps the cells of other parts.
Dummy weights, no sharing unless a cell says so, one candidate set a request; the last layer runs in full.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_prefill.bench import Job, check_peer, compared, report_head, run_side, save_report
from moe_prefill.config import EngineConfig
from moe_prefill.errors import MoePrefillError

SHORT, LONG = ("256", "4096", "32768"), ("131072",)
SIBLINGS = "8x16@2048"


def job(model: str, cells: tuple[str, ...], *, fp8: bool = False, layers: int | None = None, sweep: int = 65536) -> Job:
    config = EngineConfig(
        model=model,
        load_format="dummy",
        dtype="bfloat16",
        quantization="fp8" if fp8 else None,
        num_layers=layers,
        max_sweep_tokens=sweep,
        prune_last=False,
    )
    return Job(name=model, config=config, cells=cells)


SMALL, LARGE = "Qwen3-30B-A3B", "Qwen3-235B-A22B"
PARTS = {
    "30b-bf16": job(SMALL, SHORT),
    "30b-bf16-128k": job(SMALL, LONG, sweep=131072),
    "30b-fp8": job(SMALL, SHORT, fp8=True),
    "235b-bf16": job(LARGE, SHORT, layers=24),
    "235b-bf16-128k": job(LARGE, LONG, layers=24, sweep=131072),
    "235b-fp8": job(LARGE, SHORT, fp8=True, layers=40),
    "peers-bf16": job(SMALL, (*SHORT, SIBLINGS)),
    "peers-fp8": job(SMALL, SHORT, fp8=True),
}
PEERS = {"peers-bf16": ("vllm", "transformers"), "peers-fp8": ("vllm",)}


def tuned(part: str, options: argparse.Namespace, profile: Path | None) -> Job:
    """A part's job with what the command line says of all parts."""
    found = PARTS[part]
    config = found.config
    if options.chunk_rows:
        config = replace(config, chunk_rows=options.chunk_rows)
    if options.sweep_tokens and not part.endswith("128k"):
        config = replace(config, max_sweep_tokens=options.sweep_tokens)
    if options.layers and config.num_layers:
        config = replace(config, num_layers=options.layers)
    if options.skew:
        config = replace(config, dummy_skew=options.skew)
    cells = tuple(options.cells.split(",")) if options.cells else found.cells
    return replace(
        found,
        config=config,
        cells=cells,
        seconds=options.seconds,
        profile=profile and str(profile),
        breakdown=not options.no_breakdown,
    )


def calibrated(part: str, options: argparse.Namespace, gpu: str) -> Path | None:
    """A profile of this machine at the shapes and in the precision of a part, measured unless there is one of today's
    run.
    """
    job = PARTS[part]
    if options.profile or options.estimated:
        return options.profile
    path: Path = options.out.with_name(f"profile_{gpu}_{job.name}_{job.precision}.json".replace(" ", "_").lower())
    if path not in options.measured:
        start = time.perf_counter()
        command = ["calibrate", "--model", job.config.model, "--dtype", job.config.dtype, "--output", str(path)]
        command += ["--quantization", "fp8"] if job.precision == "fp8" else []
        subprocess.run([sys.executable, "-m", "moe_prefill.cli", *command], check=True, timeout=300)
        options.measured.append(path)
        print(f"calibrated {job.name} {job.precision}: {time.perf_counter() - start:.0f} s, {path}", flush=True)
    return path


def show(cell: dict[str, Any]) -> None:
    predicted = f", predicted {cell['predicted_mfu']:.1%}" if "predicted_mfu" in cell else ""
    rates = f"{cell['tokens_per_s']:>9,.0f} tokens/s, MFU {cell.get('mfu') or 0:.1%}{predicted}"
    print(f"{cell['model']} {cell['precision']} {cell['tokens']:>7,}: {rates}", flush=True)
    where = cell.get("breakdown")
    if where:
        layer = {name: ms / where["layers"] for name, ms in where["ms"].items()}
        print("    ms a layer: " + ", ".join(f"{name} {ms:.2f}" for name, ms in layer.items()))
        for operation, kernel, ms in where["kernels"][:14]:
            print(f"      {ms / where['layers']:7.3f}  {operation or '-':16s} {kernel}", flush=True)
    if "ratio" in cell:
        print(f"    {cell['ratio']:.2f}x {cell['peer']}: {cell['peer_tokens_per_s']:,.0f} ({cell['peer_settings']})")


def run_part(part: str, options: argparse.Namespace, head: dict[str, Any]) -> None:
    profile = calibrated(part, options, head["gpu"])
    start, mine = time.perf_counter(), tuned(part, options, profile)
    cells = run_side("ours", mine)
    save_report(options.out, head, cells, append=True)
    for peer in PEERS.get(part, ()):
        both = compared(cells, run_side(peer, mine, site=options.peer_site))
        save_report(options.out, head, both, append=True)
        for cell in both:
            show({key: value for key, value in cell.items() if key != "breakdown"})
    for cell in cells:
        show(cell)
    print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="30b-bf16", help=", ".join(PARTS))
    parser.add_argument("--cells", default=None, help="instead of the part's own, for example 4096 or 8x16@2048")
    parser.add_argument("--chunk-rows", type=int, default=None)
    parser.add_argument("--sweep-tokens", type=int, default=None, help="not for 128k parts")
    parser.add_argument("--layers", type=int, default=None, help="depth of the parts that are cut short")
    parser.add_argument("--skew", type=float, default=None, help="max/min load of experts; default: balanced")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--profile", type=Path, default=None, help="rates of this machine, for predictions")
    parser.add_argument("--estimated", action="store_true", help="predict from the datasheet, without calibrating")
    parser.add_argument("--peer-site", default=None, help="a folder of packages that holds the peer")
    parser.add_argument("--no-breakdown", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hopper.json"))
    options = parser.parse_args()
    options.measured = []  # profiles of this run
    return options


def main() -> None:
    options = parse()
    parts = options.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        sys.exit(f"error: no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    for peer in {peer for part in parts for peer in PEERS.get(part, ())}:
        check_peer(peer, options.peer_site)
    head = report_head(["python", *sys.argv])
    for part in parts:
        run_part(part, options, head)


if __name__ == "__main__":
    try:
        main()
    except MoePrefillError as error:
        sys.exit(f"error: {error}")
