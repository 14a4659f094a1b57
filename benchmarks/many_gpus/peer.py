"""vLLM on the same GPUs, in processes of its own: its ways to use several GPUs, of which the fastest counts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from moe_prefill.bench import Job, run_side
from moe_prefill.config import EngineConfig
from moe_prefill.errors import WorkerError

from .forecasts import Forecaster
from .measuring import cell_head
from .sides import ASYNCEP, Length, Side

# Arguments of vLLM's LLM class for N GPUs, and the baseline of ours that is most like it.
STRATEGIES = {
    "tp": (lambda gpus: {"tensor_parallel_size": gpus}, "tp+tp"),
    "ep": (lambda gpus: {"tensor_parallel_size": gpus, "enable_expert_parallel": True}, "tp+ep"),
    "pp": (lambda gpus: {"tensor_parallel_size": 1, "pipeline_parallel_size": gpus}, "pp+pp"),
}
# Tokens/s of vLLM 0.26 over ours on one H200, 2026-11-24: BF16 66.0K for 80.5K at 4K (results/hopper.json); FP8 30.6K
# and 15.8K for 43.7K and 19.8K at 4K and 32K (40 layers of Qwen3-235B-A22B; not in one run).
PACE = {"bf16": 0.82, "fp8": 0.75, "fp32": 0.82}
_RUNS = 2  # of a cell, worth of ``--run-tokens`` for each GPU: a pipeline is filled and drained in each


def side_of(options: argparse.Namespace, depth: int) -> Side:
    """What a peer is compared with."""
    lengths = tuple(length for length in options.tokens if isinstance(length, int))
    return Side(part="vllm", strategy=ASYNCEP, gpus=options.gpus, layers=depth, lengths=lengths, residency="sharded")


def forecast(options: argparse.Namespace, forecaster: Forecaster) -> list[dict[str, Any]]:
    """The like baseline of ours at vLLM's pace on one GPU."""
    side = side_of(options, forecaster.spec.num_layers)
    cells = []
    for name in options.peer_strategies:
        like = replace(side, part="strategies", strategy=STRATEGIES[name][1], residency=None)
        for length in side.lengths:
            rate = forecaster.forecast(like, length).cell.get("predicted_tokens_per_s")
            found = {} if rate is None else {"predicted_peer_tokens_per_s": PACE[options.precision] * rate}
            cells.append(_head(options, side, name, length) | found)
    return cells


def _head(options: argparse.Namespace, side: Side, name: str, length: Length) -> dict[str, Any]:
    return cell_head(options, side, length) | {"peer": "vllm", "peer_strategy": name}


def job_of(options: argparse.Namespace, side: Side, name: str) -> Job:
    """What the process of vLLM is to do."""
    config = EngineConfig(
        model=options.model,
        load_format="dummy",
        dtype=options.dtype,
        quantization=options.quantization,
        num_layers=side.layers,
    )
    return Job(
        name=options.name,
        config=config,
        cells=tuple(map(str, side.lengths)),
        seconds=options.seconds,
        breakdown=False,
        settings={
            "llm": STRATEGIES[name][0](side.gpus) | options.vllm,
            "batched_tokens": options.peer_batched_tokens,
            "tokens_per_call": _RUNS * options.run_tokens * side.gpus,
        },
    )


def measured(
    options: argparse.Namespace, side: Side, forecasts: Sequence[dict[str, Any]]
) -> Iterator[tuple[list[dict[str, Any]], str | None]]:
    """The cells of each of vLLM's strategies, or why there are none."""
    for name in options.peer_strategies:
        predictions = [cell for cell in forecasts if cell["peer_strategy"] == name]
        try:
            found = run_side("vllm", job_of(options, side, name), site=options.peer_site)
        except WorkerError as error:
            yield [], f"vllm {name}, {side.gpus} GPUs: {error}"
            continue
        cells = [predicted | cell for predicted, cell in zip(predictions, found, strict=True)]
        for cell in cells:
            words = f"{cell['tokens']:>7,}: {cell['peer_tokens_per_s']:>12,.0f} tokens/s"
            print(f"vllm       {name:18} {'':9} {words}", flush=True)
        yield cells, None


def with_peers(cells: Sequence[dict[str, Any]], peer_rate: str, rate: str, ratio: str) -> list[dict[str, Any]]:
    """Beside each figure of a peer ours, the ratio, and whether it is the best of the peer's strategies. ``peer_rate``,
    ``rate``, ``ratio``: names of keys. Ours are asyncep's cells of sharded banks, balanced experts and copy engines,
    of the same call.
    """

    def key(cell: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(cell.get(name) for name in ("model", "layers", "precision", "gpus", "tokens"))

    def is_ours(cell: dict[str, Any]) -> bool:
        kind = (cell.get("part"), cell.get("strategy"), cell.get("residency"), cell.get("transport"))
        return kind == ("strategies", ASYNCEP, "sharded", "copy-engine") and cell.get("dummy_skew") == 1.0

    ours = {(cell["command"], *key(cell)): cell for cell in cells if is_ours(cell) and rate in cell}
    best: dict[tuple[Any, ...], float] = {}
    for cell in cells:
        if peer_rate in cell:
            best[key(cell)] = max(cell[peer_rate], best.get(key(cell), 0.0))
    found = []
    for cell in cells:
        mine = ours.get((cell["command"], *key(cell)), {})
        if peer_rate in cell:
            more = {name: mine[name] for name in (rate, rate.replace("tokens_per_s", "mfu")) if name in mine}
            more |= {ratio: mine[rate] / cell[peer_rate]} if mine else {}
            cell = cell | more | {"best_of_peer": cell[peer_rate] == best[key(cell)]}
        found.append(cell)
    return found
