"""Peer pulls of all ranks at once: what contention costs, with slices or whole shards, staggered or not."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_prefill.bench import save_report
from moe_prefill.core import ModelSpec
from moe_prefill.experts import DEFAULT_SLICE_BYTES, BankLayout, PeerTransport, Ranks, Setup, open_lane
from moe_prefill.machine import MachineProfile
from moe_prefill.residency import expert_record

from .contenders import Rank
from .forecasts import STORED


@dataclass(frozen=True, slots=True)
class Way:
    """``pullers``: all ranks, or the first alone. ``sliced``: copies take turns over the peers. ``staggered``: every
    rank begins with another peer.
    """

    pullers: str
    sliced: bool
    staggered: bool


WAYS = (
    Way("one", True, True),
    Way("all", True, True),
    Way("all", True, False),
    Way("all", False, True),
    Way("all", False, False),
)


@dataclass(frozen=True, slots=True)
class InOrder(Ranks):
    """Ranks that all begin with the same peer."""

    def peers(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]


def forecast(options: argparse.Namespace, profile: MachineProfile, spec: ModelSpec) -> list[dict[str, Any]]:
    """Each rank at the link's own rate; where all begin with the same peer, at worst its link serves all others."""
    rate, others = profile.bandwidth("copy-engine"), options.gpus - 1
    return [
        _head(options, spec, way)
        | {"predicted_gb_per_s": 1e-9 * rate / (1 if way.staggered or way.pullers == "one" else max(1, others))}
        for way in WAYS
    ]


def _head(options: argparse.Namespace, spec: ModelSpec, way: Way) -> dict[str, Any]:
    record = expert_record(spec, STORED[options.precision])
    return {
        "part": "pulls",
        "engine": "moe-prefill",
        "model": options.name,
        "precision": options.precision,
        "gpus": options.gpus,
        "strategy": "asyncep",
        "transport": "copy-engine",
        "residency": "sharded",
        "bank_bytes": spec.num_experts * record.num_bytes,
        "pullers": way.pullers,
        "sliced": way.sliced,
        "staggered": way.staggered,
    }


def run_rank(
    rank: int, size: int, options: argparse.Namespace, folder: str, head: dict[str, Any], spec: ModelSpec
) -> None:
    """What each process does; the first one writes the results."""
    mine, cells = Rank(rank, size, options, folder), []
    for way, predicted in zip(WAYS, options.pulls, strict=True):
        rate = _rate(mine, way, spec, options)
        cells.append(predicted | {"gb_per_s": rate, "measured_over_predicted": rate / predicted["predicted_gb_per_s"]})
        if rank == 0:
            print(f"pulls      {way}: {rate:,.1f} GB/s a rank", flush=True)
    if rank == 0:
        save_report(options.out, head, cells, append=True)
    dist.destroy_process_group()


def _rate(rank: Rank, way: Way, spec: ModelSpec, options: argparse.Namespace) -> float:
    """GB/s that arrive at a rank from its peers, the slowest one that pulls."""
    layout = BankLayout(spec.num_experts, expert_record(spec, STORED[options.precision]))
    base = rank.ranks(f"pulls/{way}")
    ranks = base if way.staggered else InOrder(base.rank, base.size, base.store)
    size = min(DEFAULT_SLICE_BYTES, layout.bank_bytes // (4 * rank.size)) if way.sliced else layout.bank_bytes
    setup = Setup(layout=layout, device=rank.device, ranks=ranks, slice_bytes=size)
    transport, lane = PeerTransport([0], setup), open_lane(rank.device, size)
    transport.place(0).fill_(rank.rank + 1)
    buffer = torch.empty(layout.bank_bytes, dtype=torch.uint8, device=rank.device)
    rank.synchronize()
    mine = way.pullers == "all" or rank.rank == 0
    taken_s = []
    for _ in range(options.least_runs + 1):
        ranks.meet(f"run {len(taken_s)}")
        start = time.perf_counter()
        if mine:
            for _ in range(options.pulls_a_run):
                moved = transport.fetch(0, buffer, lane)
            lane.compute_wait(lane.mark())
            rank.synchronize()
        taken_s.append(time.perf_counter() - start)
    if mine:
        assert all(int(buffer[part].min()) == peer + 1 for peer, part in enumerate(layout.shards(rank.size))), "bytes"
        pulled = sum(count for link, count in moved.items() if link.startswith("peer."))
        rate = 1e-9 * options.pulls_a_run * pulled / sorted(taken_s[1:])[options.least_runs // 2]
    ranks.meet("done")
    lane.close()
    transport.close()
    rates = rank.collectives.gather_host([int(1e6 * rate) if mine else 1 << 60])
    return float(rates.min()) * 1e-6
