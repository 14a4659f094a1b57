"""One rank of the strategy tests: runs every case that has a place for it and writes down what it answered and sent."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest, ModelSpec
from moe_prefill.dist import open_process_group
from moe_prefill.memory import memory_plan
from moe_prefill.residency import bank_dtype
from moe_prefill.strategies import RankGroup, share_of, strategy_engine
from moe_prefill.strategies.load import load_share


@dataclass(frozen=True)
class Case:
    """``requests``: of every rank. Sizes as in a memory plan."""

    model: str
    strategy: str
    size: int
    requests: list[list[AtomicRequest]]
    sharing: str = "off"
    sweep_tokens: int = 4096
    chunk_rows: int = 64
    micro_batches: int = 2
    prune_last: bool = True
    quantization: str | None = None


@dataclass
class Outcome:
    """What one rank saw of a case. ``sweeps``: tokens and rows of the last layer. ``ids``: routed expert ids [T, K] of
    each chunk, by layer.
    """

    results: list
    sent: dict[tuple[int, str], Fraction]
    sweeps: list[tuple[int, int]] = field(default_factory=list)
    ids: dict[int, list[np.ndarray]] = field(default_factory=dict)


def run_case(case: Case, spec: ModelSpec, slots: dict[str, torch.Tensor], group: RankGroup) -> Outcome:
    share = share_of(spec, case.strategy, group.rank, group.size)
    config = EngineConfig(
        model="in memory",
        strategy=case.strategy,
        sharing=case.sharing,
        micro_batches=case.micro_batches,
        prune_last=case.prune_last,
        quantization=case.quantization,
    )
    stored = bank_dtype(config, spec, "float32")

    def fill(slot, shape, rows):
        return slots[slot][rows.start : rows.stop].to(group.device)

    weights, banks = load_share(share, fill, stored)
    memory = memory_plan(share.spec, slots["embed"].element_size(), case.sweep_tokens, case.chunk_rows)
    engine = strategy_engine(config, share, group, weights, banks, memory)
    outcome = Outcome([], engine.traffic.sent)
    route, run = engine._decoder.route, engine._run

    def recorded_route(*args):
        weights, ids = route(*args)
        outcome.ids.setdefault(engine.traffic.layer, []).append(ids.cpu().numpy().copy())
        return weights, ids

    def recorded_run(plan):
        outcome.sweeps.append((plan.forest.num_tokens, plan.last_rows))
        return run(plan)

    engine._decoder.route, engine._run = recorded_route, recorded_run
    outcome.results = engine.score(case.requests[group.rank])
    engine.close()
    return outcome


def main(path: str, rank: int) -> None:
    folder = Path(path)
    torch.set_num_threads(1)
    job = torch.load(folder / "job.pt", weights_only=False)
    device = torch.device("cuda", rank) if job["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    outcomes: dict[int, Outcome] = {}
    for size in sorted({case.size for case in job["cases"]}):
        if rank >= size:
            continue
        open_process_group(dist.FileStore(f"{folder}/store{size}", size), rank, size, device)
        group = RankGroup.of_world(device)
        for number, case in enumerate(job["cases"]):
            if case.size == size:
                outcomes[number] = run_case(case, *job["models"][case.model], group)
        dist.destroy_process_group()
    torch.save(outcomes, folder / f"rank{rank}.pt")
