"""asyncep and the five baselines on the same GPUs, weights and token ids, each with its own best sweep and chunk sizes.

    python benchmarks/two_gpu.py --gpus 2 --model Qwen3-30B-A3B --out benchmarks/results/two_gpu.json
    python benchmarks/two_gpu.py --gpus 8 --model Qwen3-235B-A22B --layers 40 --quantization fp8 --out ...

Starts one process a GPU. Dummy weights; the last layer runs in full; no sharing. A sweep size is that of one rank's
sweep under asyncep and dp, of all ranks' under tp and pp. Every setting of the lists is run once to warm up and once
timed; the fastest is then measured: warm up until two runs agree within 2%, the median of at least five runs. A run
begins when all ranks are ready and ends when the last one has its answers; a pipeline, which is filled and drained in
each, is given runs of twice the tokens. The results file is written after each strategy; ``searched`` in it lists every
setting tried, with its seconds, or why it was refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.dist import open_process_group
from moe_prefill.engine import LocalEngine, build_engine
from moe_prefill.engine.build import pick_dtype
from moe_prefill.engine.load import open_model
from moe_prefill.errors import MoePrefillError
from moe_prefill.experts import Ranks
from moe_prefill.machine import datasheet_peak
from moe_prefill.memory import memory_plan
from moe_prefill.strategies import NAMES, Collectives, RankGroup, requested_share, strategy_engine
from moe_prefill.strategies.build import agreed_plan, load_rank

GIB = 1 << 30
ASYNCEP = "asyncep"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is searched: tokens of a sweep, rows of a chunk, micro-batches of a sweep (pp+pp)."""

    sweep_tokens: int
    chunk_rows: int
    micro_batches: int = 1


class Rank:
    """One process of the benchmark: what it shares with the others, and the clock that they agree on."""

    def __init__(self, rank: int, options: argparse.Namespace, folder: str) -> None:
        self.options, self.rank, self.size = options, rank, options.gpus
        self.device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
        self.store = dist.FileStore(f"{folder}/store", self.size)
        open_process_group(self.store, rank, self.size, self.device)
        self.group = RankGroup.of_world(self.device)
        self.collectives = Collectives(self.group)

    def config(self, strategy: str, setting: Setting) -> EngineConfig:
        options = self.options
        return EngineConfig(
            model=options.model,
            device=options.device,
            dtype=options.dtype,
            load_format="dummy",
            num_layers=options.layers,
            dummy_skew=options.skew,
            quantization=options.quantization,
            sharing="off",
            prune_last=False,
            residency=options.residency if strategy == ASYNCEP else None,
            transport=options.transport,
            memory_gib=options.hbm_gib,
            threads=1 if options.device == "cpu" else None,
            strategy=strategy,  # type: ignore[arg-type]
            max_sweep_tokens=setting.sweep_tokens,
            chunk_rows=setting.chunk_rows,
            micro_batches=setting.micro_batches,
        )

    def settings(self, strategy: str) -> list[Setting]:
        """Largest first; where no sweep of the list holds the longest request, that request is a sweep."""
        options = self.options
        micro = options.micro_batches if strategy == "pp+pp" else [1]
        sweeps = sorted({*options.sweeps, max(*options.sweeps, *options.tokens)}, reverse=True)
        return [Setting(*each) for each in itertools.product(sweeps, sorted(options.chunks, reverse=True), micro)]

    def seconds(self, engine: LocalEngine, requests: list[AtomicRequest]) -> float:
        """One run, from when all ranks are ready until the last has its answers; the same number on all ranks."""
        self.synchronize()
        self.collectives.gather_host([0])
        start = time.perf_counter()
        answers = engine.score(requests)
        self.synchronize()
        mine = time.perf_counter() - start
        assert not any(isinstance(answer, Exception) for answer in answers), answers
        return float(self.collectives.gather_host([int(1e9 * mine)]).max()) * 1e-9

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def total(self, value: int) -> int:
        return int(self.collectives.gather_host([value]).sum())

    def most(self, value: int) -> int:
        return int(self.collectives.gather_host([value]).max())


class Contender(ABC):
    """One strategy: its weights are loaded once, and an engine is made for every setting that fits."""

    def __init__(self, rank: Rank, strategy: str) -> None:
        self.rank, self.strategy = rank, strategy
        self.settings: list[Setting] = []
        self.refused: dict[str, str] = {}
        self.owns_requests = strategy == ASYNCEP or strategy.startswith("dp+")

    @abstractmethod
    def engine(self, setting: Setting) -> AbstractContextManager[LocalEngine]:
        """An engine with these sizes, for the duration of the block."""

    def close(self) -> None:
        gc.collect()
        if self.rank.device.type == "cuda":
            torch.cuda.empty_cache()


class Baseline(Contender):
    def __init__(self, rank: Rank, strategy: str) -> None:
        super().__init__(rank, strategy)
        spec, _ = open_model(rank.options.model, "dummy", rank.options.layers)
        settings = rank.settings(strategy)
        config = rank.config(strategy, settings[0])
        dtype = pick_dtype(config.dtype, spec, rank.device)
        self.share = requested_share(config, spec, rank.rank, rank.size)
        self.plans = {}
        for setting in settings:
            try:
                self.plans[setting] = agreed_plan(rank.config(strategy, setting), self.share, rank.group, dtype)
            except MoePrefillError as error:
                self.refused[str(setting)] = str(error)
        self.settings = list(self.plans)
        if self.settings:
            self.weights, self.banks = load_rank(config, self.share, None, rank.device, dtype)

    @contextmanager
    def engine(self, setting: Setting) -> Iterator[LocalEngine]:
        config, plan = self.rank.config(self.strategy, setting), self.plans[setting]
        engine = strategy_engine(config, self.share, self.rank.group, self.weights, self.banks, plan)
        yield engine
        engine.close()

    def close(self) -> None:
        self.weights = self.banks = None  # type: ignore[assignment]
        super().close()


class AsyncEp(Contender):
    """Built once, with the largest sweep and chunks that fit; smaller settings lie within its memory."""

    def __init__(self, rank: Rank, strategy: str) -> None:
        super().__init__(rank, strategy)
        wanted = rank.settings(strategy)
        self._engine: LocalEngine | None = None
        for number, built in enumerate(wanted):
            ranks = Ranks(rank.rank, rank.size, dist.PrefixStore(f"asyncep/{number}", rank.store))
            try:
                self._engine = build_engine(rank.config(strategy, built), ranks)
            except MoePrefillError as error:
                self.refused[str(built)] = str(error)
                continue
            self.settings = [each for each in wanted[number:] if each.chunk_rows <= built.chunk_rows]
            break

    @contextmanager
    def engine(self, setting: Setting) -> Iterator[LocalEngine]:
        engine = self._engine
        assert engine is not None
        element = engine._weights.embed.element_size()
        engine.memory = memory_plan(engine.spec, element, setting.sweep_tokens, setting.chunk_rows)
        yield engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        super().close()


def requests_of(rank: Rank, contender: Contender, tokens: int, vocab: int) -> list[AtomicRequest]:
    """The same ids for every strategy: all of them, or this rank's part."""
    count = max(1, rank.options.run_tokens // tokens) * rank.size * (2 if contender.strategy == "pp+pp" else 1)
    ids = np.random.default_rng(tokens).integers(0, vocab, (count, tokens), dtype=np.int32)
    mine = ids[rank.rank :: rank.size] if contender.owns_requests else ids
    return [AtomicRequest.candidates(row, [3, 5]) for row in mine]


def contender_of(rank: Rank, strategy: str) -> Contender:
    return AsyncEp(rank, strategy) if strategy == ASYNCEP else Baseline(rank, strategy)


def measure(rank: Rank, contender: Contender, tokens: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A cell, where any setting fits, and what was searched."""
    if rank.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rank.device)
    spec, _ = open_model(rank.options.model, "dummy", rank.options.layers)
    requests = requests_of(rank, contender, tokens, spec.vocab_size)
    tried: dict[Setting, float] = {}
    for setting in contender.settings:
        if setting.sweep_tokens < tokens:
            continue
        with contender.engine(setting) as engine:
            rank.seconds(engine, requests)
            tried[setting] = rank.seconds(engine, requests)
    searched: dict[str, Any] = {
        "strategy": contender.strategy,
        "tokens": tokens,
        "refused": contender.refused,
        "seconds": {str(setting): took for setting, took in tried.items()},
    }
    if not tried:
        return None, searched
    best = min(tried, key=lambda setting: tried[setting])
    with contender.engine(best) as engine:
        return cell_of(rank, contender, engine, best, requests, tokens), searched | {"best": str(best)}


def cell_of(
    rank: Rank, contender: Contender, engine: LocalEngine, setting: Setting, requests: list[AtomicRequest], tokens: int
) -> dict[str, Any]:
    previous = rank.seconds(engine, requests)
    for _ in range(6):
        now = rank.seconds(engine, requests)
        agreed, previous = abs(now - previous) <= 0.02 * previous, now
        if agreed:
            break
    flops, exposed, sweeps = engine.stats.flops, engine.stats.exposed_s, engine.stats.sweeps
    runs = [rank.seconds(engine, requests) for _ in range(rank.options.least_runs)]
    while sum(runs) < rank.options.seconds:
        runs.append(rank.seconds(engine, requests))
    median, each = statistics.median(runs), rank.size if contender.owns_requests else 1
    flops = (engine.stats.flops - flops) // len(runs)
    flops, total = rank.total(flops) if each > 1 else flops, len(requests) * each * tokens
    cell = {
        "strategy": contender.strategy,
        "tokens": tokens,
        "model": Path(rank.options.model).name,
        "layers": engine.spec.num_layers,
        "precision": rank.options.quantization or ("bf16" if engine._weights.embed.element_size() == 2 else "fp32"),
        "requests": len(requests) * each * len(runs),
        "sweep_tokens": setting.sweep_tokens,
        "transport": rank.options.transport if contender.strategy == ASYNCEP else dist.get_backend(),
        "tokens_per_s": total / median,
        "sweep_ms": 1e3 * median * setting.sweep_tokens * each / total,
        "expert_load_max_over_mean": expert_load(rank, contender, engine, requests),
        "command": "python " + " ".join(sys.argv),
    }
    if isinstance(contender, AsyncEp):
        levels = engine.residency.levels if engine.residency is not None else ()
        cell["residency"] = ", ".join(f"{levels.count(level)} {level}" for level in dict.fromkeys(levels) if level)
        cell["exposed_ms"] = 1e3 * (engine.stats.exposed_s - exposed) / max(1, engine.stats.sweeps - sweeps)
    if rank.device.type == "cuda":
        cell["peak_hbm_gib"] = rank.most(torch.cuda.max_memory_allocated(rank.device)) / GIB
        precision = "float8" if rank.options.quantization == "fp8" else "bfloat16"
        peak = datasheet_peak(torch.cuda.get_device_name(rank.device), precision)
        if peak is not None:
            cell["mfu"] = flops / median / (peak * rank.size)
    return cell


def expert_load(rank: Rank, contender: Contender, engine: LocalEngine, requests: list[AtomicRequest]) -> float:
    """Tokens of the most loaded expert over the mean, averaged over layers; from one run that is not timed."""
    counts: dict[int, torch.Tensor] = {}
    decoder, route = engine._decoder, engine._decoder.route

    def counted(weights: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = route(weights, x)
        found = torch.bincount(chosen[1].flatten(), minlength=engine.spec.num_experts)
        key = id(weights)
        counts[key] = counts[key] + found if key in counts else found
        return chosen

    decoder.route = counted  # type: ignore[method-assign]
    engine.score(requests)
    decoder.route = route  # type: ignore[method-assign]
    loads = torch.stack(list(counts.values())).cpu()
    if contender.owns_requests:
        loads = torch.from_numpy(rank.collectives.gather_host(loads.flatten().tolist()).sum(0)).view(loads.shape)
    return float((loads.max(1).values / loads.double().mean(1)).mean())


def run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    mine, report = Rank(rank, options, folder), heading(options)
    for strategy in options.strategies:
        try:
            contender = contender_of(mine, strategy)
        except MoePrefillError as error:
            report["searched"].append({"strategy": strategy, "refused": str(error)})
            continue
        for tokens in options.tokens:
            cell, searched = measure(mine, contender, tokens)
            report["searched"].append(searched)
            report["cells"] += [cell] if cell is not None else []
        contender.close()
        add_ratios(report["cells"])
        if rank == 0:
            print(*(json.dumps(cell) for cell in report["cells"] if cell["strategy"] == strategy), sep="\n", flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


def add_ratios(cells: list[dict[str, Any]]) -> None:
    """``ratio``: asyncep's tokens/s over the cell's, at the same length."""
    rates = {cell["tokens"]: cell["tokens_per_s"] for cell in cells if cell["strategy"] == ASYNCEP}
    for cell in cells:
        if cell["strategy"] != ASYNCEP and cell["tokens"] in rates:
            cell["ratio"] = rates[cell["tokens"]] / cell["tokens_per_s"]


def heading(options: argparse.Namespace) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return {
        "gpu": f"{options.gpus}x {name}",
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "git": git.stdout.strip(),
        "torch": torch.__version__,
        "cells": [],
        "searched": [],
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="Qwen3-30B-A3B")
    parser.add_argument("--layers", type=int, default=None, help="reduced depth: at least 24 (BF16) or 40 (FP8)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", choices=("fp8",), default=None)
    parser.add_argument("--skew", type=float, default=None)
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=[ASYNCEP, *NAMES])
    parser.add_argument("--residency", default="sharded", help="of asyncep")
    parser.add_argument("--transport", choices=("copy-engine", "nccl"), default="copy-engine", help="of asyncep")
    parser.add_argument("--tokens", type=numbers, default=[256, 4096, 32768])
    parser.add_argument("--sweeps", type=numbers, default=[65536, 131072])
    parser.add_argument("--chunks", type=numbers, default=[16384, 32768])
    parser.add_argument("--micro-batches", type=numbers, default=[4, 8])
    parser.add_argument("--run-tokens", type=int, default=131072, help="tokens a GPU in one run")
    parser.add_argument("--seconds", type=float, default=0.0, help="of timed runs, at least")
    parser.add_argument("--least-runs", type=int, default=5)
    parser.add_argument("--hbm-gib", type=float, default=None)
    options = parser.parse_args()
    # A collective that multicasts in the switch is another machine than the one the copies run on.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are on this host
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (options, folder), nprocs=options.gpus)


if __name__ == "__main__":
    main()
