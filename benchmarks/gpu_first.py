"""Throughput of dummy Qwen3-30B-A3B in BF16 on one GPU, beside transformers on the same weights, token ids and machine.

    python benchmarks/gpu_first.py --out benchmarks/results/gpu_first.json

transformers gets views of the same weights, so both sides compute the same function, and the last logits of both are
compared. The last layer runs in full; the gain of pruning it is a cell of its own. ``hopper.py`` has the whole table.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_prefill.bench import Job, compared, report_head, run_side, save_report
from moe_prefill.config import EngineConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=None, help="a model of reduced depth, at least 24")
    parser.add_argument("--cells", default="256,4096,32768")
    parser.add_argument("--sweep-tokens", type=int, default=65536)
    parser.add_argument("--chunk-rows", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--profile", type=Path, default=None, help="write where a sweep's time goes (JSON)")
    options = parser.parse_args()
    config = EngineConfig(
        model="Qwen3-30B-A3B",
        load_format="dummy",
        dtype="bfloat16",
        max_sweep_tokens=options.sweep_tokens,
        num_layers=options.layers,
        chunk_rows=options.chunk_rows,
        prune_last=False,
    )
    job = Job(
        name=config.model,
        config=config,
        cells=tuple(options.cells.split(",")),
        seconds=options.seconds,
        breakdown=options.profile is not None,
    )
    cells = run_side("ours", job)
    breakdowns: list[Any] = [cell.pop("breakdown", None) for cell in cells]
    pruned = replace(job, config=replace(config, prune_last=True), cells=("4096",), breakdown=False)
    cells = cells if options.no_peer else compared(cells, run_side("transformers", job))
    save_report(options.out, report_head(["python", *sys.argv]), cells + run_side("ours", pruned))
    if options.profile is not None:
        options.profile.write_text(json.dumps(dict(zip(job.cells, breakdowns, strict=True)), indent=1) + "\n")


if __name__ == "__main__":
    main()
