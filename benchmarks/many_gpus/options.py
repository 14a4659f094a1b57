"""The command line that the scripts share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_prefill.strategies import NAMES

from .aggregated import TIERS
from .peer import STRATEGIES
from .requests import MIXED
from .sides import ASYNCEP, Length

PARTS = ("strategies", "transports", "vllm", "pulls", "aggregated", "envelope", "scaling")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def lengths(text: str) -> list[Length]:
    return [MIXED if part == MIXED else int(part) for part in text.split(",")]


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
    add("--tokens", type=lengths, default=[256, 4096, 32768, 131072, MIXED], help=f"of a request; {MIXED}: --mixed")
    add("--mixed", type=numbers, default=[256, 4096, 32768], help="tokens of a mixed cell's requests, in equal parts")
    add("--threshold-length", type=int, default=1024, help="tokens of a request in sweeps of T")
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
    add("--tiers", type=words, default=[str(tier) for tier in TIERS], help="of the aggregated workload")
    add("--envelope-gib", type=float, default=78.0, help="memory of the smaller card")
    add("--peer-site", default=None, help="a folder of packages that holds vLLM")
    add("--peer-strategies", type=words, default=list(STRATEGIES), help="of vLLM")
    add("--peer-batched-tokens", type=numbers, default=[32768], help="tokens of a step of vLLM, each tried")
    add("--vllm", type=json.loads, default={}, help="more arguments of vLLM's LLM class, as a JSON object")
    add("--hbm-gib", type=float, default=None)
    add("--host-gib", type=float, default=None)
    options = parser.parse_args()
    named = {
        "parts": PARTS,
        "strategies": (ASYNCEP, *NAMES),
        "peer_strategies": tuple(STRATEGIES),
        "tiers": tuple(map(str, TIERS)),
    }
    for option, known in named.items():
        unknown = [name for name in getattr(options, option) if name not in known]
        if unknown:
            parser.error(f"--{option.replace('_', '-')}: no {', '.join(unknown)}; there are {', '.join(known)}")
    options.assumed_hbm_gib = options.hbm_gib or 139.0
    options.assumed_host_gib = options.host_gib or 512.0
    return options
