"""FlashAttention 3 on one Hopper GPU, its tiles holding one query head or all heads of a key/value head.

    python benchmarks/attention_packing.py --out benchmarks/results/attention_packing.json

65,536 rows of queries in equal requests of many lengths, causal, and in parts of requests against a prefix, at the head
counts of Qwen3-30B-A3B and Qwen3-235B-A22B. Prints both times, whether the answers are equal, and what
``ops.flash.packs_heads`` chooses; ends with status 1 where answers differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_prefill.bench.ceilings import Clock
from moe_prefill.bench.report import report_head, save_report
from moe_prefill.ops.attention import Spans
from moe_prefill.ops.flash import chosen, flash_3, packs_heads

ROWS, CHANNELS, KV_HEADS = 65536, 128, 4
HEADS = (32, 64)
LENGTHS = (128, 200, 256, 300, 512, 700, 1024, 1500, 2048, 4096, 5000, 32768, 65536)
PREFIX, BELOW = 2048, (128, 512, 700, 2048, 8192)  # keys of a prefix, and rows of queries that see it


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Entries of ``queries`` rows each against ``keys`` keys each."""

    queries: int
    keys: int
    causal: bool

    def spans(self, device: torch.device) -> Spans:
        count = ROWS // max(self.queries, self.keys)
        cu_q, cu_k = (np.arange(count + 1, dtype=np.int32) * size for size in (self.queries, self.keys))
        return Spans.on(device, cu_q, cu_k)


def cases() -> Iterator[Case]:
    yield from (Case(length, length, True) for length in LENGTHS)
    yield from (Case(rows, PREFIX, False) for rows in BELOW)


def measure(case: Case, heads: int, clock: Clock) -> dict[str, Any]:
    device, spans = clock.device, case.spans(clock.device)
    q = torch.randn(int(spans.cu_q[-1]), heads, CHANNELS, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(int(spans.cu_k[-1]), KV_HEADS, CHANNELS, device=device, dtype=torch.bfloat16) for _ in "kv")

    def run(pack: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_3(q, k, v, spans, case.causal, None, CHANNELS**-0.5, pack)

    equal = all(torch.equal(*pair) for pair in zip(run(True), run(False), strict=True))
    packed_s, unpacked_s = (clock.seconds(lambda pack=pack: run(pack)) for pack in (True, False))
    num_q, num_k = np.diff(spans.cu_q), np.diff(spans.cu_k)
    return {
        "heads": heads,
        "kv_heads": KV_HEADS,
        "queries": case.queries,
        "keys": case.keys,
        "causal": case.causal,
        "entries": len(num_q),
        "packed_ms": 1e3 * packed_s,
        "unpacked_ms": 1e3 * unpacked_s,
        "packed_over_unpacked": packed_s / unpacked_s,
        "packs": packs_heads(num_q, num_k, heads // KV_HEADS, causal=case.causal),
        "equal": equal,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    device = torch.device("cuda")
    if (kernel := chosen(device).name) != "flash-attention-3":
        sys.exit(f"{kernel} runs here, which has no such tiles; install fa3-fwd on a Hopper GPU")
    clock, cells = Clock(device), []
    for heads in HEADS:
        for case in cases():
            cells.append(cell := measure(case, heads, clock))
            print(", ".join(f"{key} {value:.4g}" for key, value in cell.items()), flush=True)
    if options.out is not None:
        save_report(options.out, report_head(["python", *sys.argv]), cells)
    return int(not all(cell["equal"] for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
