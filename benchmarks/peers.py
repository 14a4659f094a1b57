"""Our engine and a peer on the same model shapes and token ids, on one machine, each in a process of its own.

    python benchmarks/peers.py --peer vllm,transformers --cells 256,4096,32768,8x16@2048 --out peers.json

Ratios are printed, and cells saved by the keys of result files. A peer that lives outside this environment is found
with --peer-site FOLDER.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moe_prefill.bench import Job, check_peer, compared, report_head, run_side, save_report
from moe_prefill.config import EngineConfig
from moe_prefill.errors import MoePrefillError


def job_of(options: argparse.Namespace) -> Job:
    config = EngineConfig(
        model=options.model,
        load_format=options.load_format,
        dtype=options.dtype,
        quantization="fp8" if options.quantization == "fp8" else None,
        num_layers=options.layers,
        max_sweep_tokens=options.max_tokens,
        chunk_rows=options.chunk_rows,
        prune_last=options.prune_last,
        threads=options.threads,
    )
    settings: dict[str, Any] = {"llm": json.loads(options.vllm)} if options.vllm else {}
    if options.batched_tokens:
        settings["batched_tokens"] = [int(number) for number in options.batched_tokens.split(",")]
    return Job(
        name=Path(options.model).name,
        config=config,
        cells=tuple(options.cells.split(",")),
        seconds=options.seconds,
        breakdown=False,
        settings=settings,
    )


def apart(cell: dict[str, Any]) -> str:
    difference = cell.get("largest_relative_difference")
    return "" if difference is None else f"; logits at most {difference:.2%} apart"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen3-30B-A3B")
    parser.add_argument("--load-format", choices=("dummy", "safetensors"), default="dummy")
    parser.add_argument("--peer", default="vllm,transformers")
    parser.add_argument("--peer-site", default=None, help="a folder of packages that holds the peer")
    parser.add_argument("--cells", default="256,4096,32768,8x16@2048")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--max-tokens", type=int, default=65536, help="of a sweep of ours")
    parser.add_argument("--chunk-rows", type=int, default=None)
    parser.add_argument("--prune-last", action="store_true", help="our last layer computes only the rows it must")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--batched-tokens", default=None, help="vLLM: tokens of a step to try, for example 16384,32768")
    parser.add_argument("--vllm", default=None, help="vLLM: more arguments of its LLM class, as a JSON object")
    parser.add_argument("--out", type=Path, required=True, help="a result file; its other cells stay")
    return parser.parse_args()


def main() -> None:
    options = parse()
    job, peers = job_of(options), options.peer.split(",")
    for peer in peers:
        check_peer(peer, options.peer_site)
    ours = run_side("ours", job)
    head = report_head(["python", *sys.argv])
    for peer in peers:
        cells = compared(ours, run_side(peer, job, site=options.peer_site))
        save_report(options.out, head, cells, append=True)
        for cell, name in zip(cells, job.cells, strict=True):
            rates = f"{cell['tokens_per_s']:,.0f} against {cell['peer_tokens_per_s']:,.0f} tokens/s"
            print(f"{name:>12}: {rates}, {cell['ratio']:.2f}x {peer} {cell['peer_version']}{apart(cell)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except MoePrefillError as error:
        sys.exit(f"error: {error}")
