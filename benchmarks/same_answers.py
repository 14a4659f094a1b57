"""25,000 rows with the demo model: streamed expert banks against resident ones, every answer compared.

    python benchmarks/same_answers.py --out benchmarks/results/same_answers.json

Rows are the shipped mails, over and over, each copy under a number of its own. On a GPU also with two worker processes
on it that pull each other's halves of every bank through inter-process memory, and with two GPUs between them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moe_prefill import Engine

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/demo_model/checkpoint"
MAILS = ROOT / "examples/data/mails.csv"
TEMPLATE = "Mail:\n{text}\n\nQuestion: Is this mail spam or ham?\nAnswer:"


def rows(count: int) -> list[str]:
    with MAILS.open(newline="", encoding="utf-8") as lines:
        mails = [row["text"] for row in csv.DictReader(lines)]
    return [f"No. {number}\n{mails[number % len(mails)]}" for number in range(count)]


def answers(texts: list[str], settings: dict[str, Any]) -> tuple[list[Any], float]:
    with Engine(MODEL, **settings) as engine:
        start = time.perf_counter()
        found = engine.classify(texts, labels=["spam", "ham"], template=TEMPLATE, label_prefix=" ", truncate="right")
        return found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=25_000)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda:0" if on_gpu else "cpu"
    sweep = {"max_sweep_tokens": 65536 if on_gpu else 8192, "host_gib": 8.0, "chunk_rows": 16384 if on_gpu else 1024}
    variants: dict[str, dict[str, Any]] = {
        "offloaded": {"device": device, "residency": "offloaded"},
        "every second offloaded, three buffers": {
            "device": device,
            "residency": "resident,offloaded,resident,offloaded,resident,offloaded",
            "prefetch_depth": 2,
        },
        "two processes on one device, sharded": {"device": device, "gpus": 2, "residency": "sharded"},
        "two processes on one device, hybrid": {"device": device, "gpus": 2, "residency": "hybrid"},
    }
    if torch.cuda.device_count() > 1:
        variants["two GPUs, sharded"] = {"device": "cuda", "gpus": 2, "residency": "sharded"}
        variants["two GPUs, hybrid"] = {"device": "cuda", "gpus": 2, "residency": "hybrid"}
    texts = rows(options.rows)
    expected, resident_s = answers(texts, {"device": device, "residency": "resident", **sweep})
    assert all(row.error is None for row in expected), next(row.error for row in expected if row.error)
    cells = []
    for name, settings in variants.items():
        found, took = answers(texts, settings | sweep)
        different = sum(mine != theirs for mine, theirs in zip(found, expected, strict=True))
        cells.append({"variant": name, "rows": len(found), "different": different, "seconds": took})
        print(json.dumps(cells[-1]), flush=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "gpu": torch.cuda.get_device_name() if on_gpu else f"none; {platform.processor()}",
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "git": git.stdout.strip(),
        "torch": torch.__version__,
        "resident_s": resident_s,
        "cells": cells,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
