"""The aggregated workload in tiers: what the backend brings, what the frontend adds, and PrefillOnly's scheduler.

asyncep runs as a server does, worker processes behind the frontend. A baseline without a balancer runs as a job does,
its sweeps formed from the sorted list, which shares all there is to share. Baselines under a balancer have no residency
plan that a frontend could route by: each rank works out by itself what the frontend would give everybody, round by
round, and computes its own part. That takes the same time on all ranks, as the ranks of dp+ep are in step, and it
costs no messages.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moe_prefill.config import EngineConfig
from moe_prefill.core import ModelSpec
from moe_prefill.errors import MoePrefillError
from moe_prefill.forming import Forming, sharing_rule
from moe_prefill.frontend import Machine, make_policy
from moe_prefill.machine import MachineProfile
from moe_prefill.memory import MemoryPlan
from moe_prefill.residency import plan_for
from moe_prefill.residency.speed import PRECISIONS, with_chunks
from moe_prefill.simulate import simulate
from moe_prefill.simulate.machine import planned_machine
from moe_prefill.strategies import share_of
from moe_prefill.strategies.memory import fit_share
from moe_prefill.workloads import Workload, make_workload

from .contenders import config_of
from .forecasts import STORED, Forecaster
from .measuring import cell_head
from .routed import sweeps_of, tickets_of
from .sides import ASYNCEP, Side
from .uneven import Timer, batch_of

FRONTEND = {"vllm": "off", "ours": "on"}


@dataclass(frozen=True, slots=True)
class Tier:
    """``policy``: who gets which request and when; None: a job's sorted list."""

    strategy: str
    policy: str | None = None

    @classmethod
    def parse(cls, text: str) -> Tier:
        strategy, _, policy = text.partition(":")
        return cls(strategy, policy or None)

    @property
    def in_ranks(self) -> bool:
        """A baseline under a balancer: see above."""
        return self.strategy != ASYNCEP and self.policy is not None

    @property
    def keys(self) -> dict[str, str]:
        """By the names of result files; ``frontend``: whether it is ours."""
        found = {"policy": self.policy, "frontend": FRONTEND.get(self.policy or "")}
        return {key: value for key, value in found.items() if value is not None}

    @classmethod
    def of(cls, cell: dict[str, Any]) -> Tier:
        return cls(cell["strategy"], cell.get("policy"))

    def __str__(self) -> str:
        return self.strategy if self.policy is None else f"{self.strategy}:{self.policy}"


TIERS = (
    Tier("dp+ep"),
    Tier("dp+ep", "vllm"),
    Tier(ASYNCEP, "vllm"),
    Tier(ASYNCEP, "ours"),
    Tier("dp+ep", "shortest-prefill"),
    Tier("pp+pp", "shortest-prefill"),
)


def side_of(options: argparse.Namespace, tier: Tier, depth: int) -> Side:
    residency = None if tier.strategy != ASYNCEP else "sharded" if options.gpus > 1 else "auto"
    return Side(part="aggregated", strategy=tier.strategy, gpus=options.gpus, layers=depth, residency=residency)


def config_for(options: argparse.Namespace, side: Side) -> EngineConfig:
    """As jobs and servers run: sharing, and a last layer of the asked rows."""
    return replace(
        config_of(options, side),
        gpus=options.gpus,
        sharing="auto",
        prune_last=True,
        max_sweep_tokens=max(options.sweeps),
        keep_prefixes=side.strategy == ASYNCEP,
        micro_batches=max(options.micro_batches),
    )


def forecast(options: argparse.Namespace, forecaster: Forecaster) -> list[dict[str, Any]]:
    """The tiers, on the assumed memory: asyncep by the simulator, baselines by the cost model of their sweeps."""
    cells = []
    for tier in map(Tier.parse, options.tiers):
        if options.gpus == 1 and tier.strategy != ASYNCEP:
            continue
        side = side_of(options, tier, forecaster.spec.num_layers)
        predict: Callable[..., dict[str, Any]] = _asyncep if tier.strategy == ASYNCEP else _baseline
        try:
            cells.append(predict(options, forecaster, tier, side))
        except MoePrefillError as error:
            cells.append(cell_head(options, side, "aggregated") | tier.keys | {"refused": str(error)})
    return cells


def _asyncep(options: argparse.Namespace, forecaster: Forecaster, tier: Tier, side: Side) -> dict[str, Any]:
    spec, dtype, profile = forecaster.spec, forecaster.dtype, forecaster.profile
    plan = plan_for(config_for(options, side), spec, forecaster.budget(side.gpus), dtype=dtype, profile=profile)
    machine = planned_machine(spec, with_chunks(profile, plan.sweep.chunk_rows), plan)
    workload = workload_of(options, spec, plan.longest_request)
    assert tier.policy is not None
    policy = make_policy(tier.policy, machine.costs, machine.limits)
    outcome = simulate(tickets_of(workload.requests, spec), machine, side.gpus, policy)
    return tier_head(options, side, tier, workload) | {
        "predicted_tokens_per_s": float(outcome.tokens_per_s),
        "predicted_saved_fraction": outcome.saved_fraction,
    }


def _baseline(options: argparse.Namespace, forecaster: Forecaster, tier: Tier, side: Side) -> dict[str, Any]:
    """Round by round, or micro-batch by micro-batch."""
    spec, config = forecaster.spec, config_for(options, side)
    share, budget = share_of(spec, side.strategy, 0, side.gpus), forecaster.budget(side.gpus)  # type: ignore[arg-type]
    stored, sizes = forecaster.stored, {"dtype": forecaster.dtype, "wanted": config.max_sweep_tokens}
    memory = fit_share(share, budget.kind, budget.device_bytes, bank_dtype=stored, **sizes).sweep  # type: ignore[arg-type]
    workload = workload_of(options, spec, memory.limits(spec).max_request_tokens)
    forming = Forming(limits=memory.limits(spec), rule=sharing_rule(spec, "auto"))
    micro = replace(forming, limits=replace(forming.limits, max_sweep_tokens=_micro_tokens(config, memory)))
    if tier.policy is None:
        members = forming.sweeps(workload.requests, range(len(workload.requests)))
        sweeps = [[workload.requests[index] for index in each] for each in members]
        ranks = [sweeps[rank :: side.gpus] for rank in range(side.gpus)]
    else:
        machine = machine_of(options, spec, forming, forecaster.profile)
        ranks = sweeps_of(workload.requests, side, machine, tier.policy, micro)
    batches = [[batch_of(each, forming, spec.vocab_size) if each else None for each in own] for own in ranks]
    profile = with_chunks(forecaster.profile, memory.chunk_rows)
    seconds = Timer(side=side, spec=spec, profile=profile, precision=forecaster.precision).seconds(batches)
    every = batches if side.owns_requests else batches[:1]
    computed = sum(batch.num_tokens for own in every for batch in own if batch is not None)
    return tier_head(options, side, tier, workload) | {
        "predicted_tokens_per_s": workload.num_tokens / seconds,
        "predicted_saved_fraction": 1 - computed / workload.num_tokens,
    }


def _micro_tokens(config: EngineConfig, memory: MemoryPlan) -> int:
    return -(-memory.max_sweep_tokens // config.micro_batches)


def machine_of(options: argparse.Namespace, spec: ModelSpec, forming: Forming, profile: MachineProfile) -> Machine:
    """A baseline's rank as the frontend sees it: nothing streams, and the sweeps are those of its memory plan."""
    return Machine.planned(
        spec=spec,
        profile=profile if forming.limits.chunk_rows is None else with_chunks(profile, forming.limits.chunk_rows),
        precision=PRECISIONS[STORED[options.precision]],
        sweep_tokens=forming.limits.max_sweep_tokens,
        max_request_tokens=forming.limits.max_request_tokens,
        rule=forming.rule,
    )


def workload_of(options: argparse.Namespace, spec: ModelSpec, longest: int) -> Workload:
    return make_workload("aggregated", scale=options.scale).fitted(longest, spec.vocab_size)


def tier_head(options: argparse.Namespace, side: Side, tier: Tier, workload: Workload) -> dict[str, Any]:
    sizes = {"requests": len(workload.requests), "prompt_tokens": workload.num_tokens}
    return cell_head(options, side, "aggregated") | tier.keys | sizes
