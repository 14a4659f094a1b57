"""What the cost model says of every cell, before any of them is run; needs no GPU."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

from moe_prefill.core import ModelSpec
from moe_prefill.costmodel import Batch, Peer, batch_flops, predict_strategy, predict_sweep, saturation
from moe_prefill.errors import MoePrefillError
from moe_prefill.forming import Forming, sharing_rule
from moe_prefill.machine import MachineProfile
from moe_prefill.memory import GIB, memory_plan
from moe_prefill.residency import DTYPE_BYTES, Budget, Pins, ResidencyPlan, bank_bytes, plan_for, plan_residency
from moe_prefill.residency.speed import PRECISIONS, with_chunks
from moe_prefill.strategies import share_of
from moe_prefill.strategies.memory import fit_share

from .contenders import config_of, settings_of
from .measuring import cell_head, planned_memory
from .requests import MIXED, dealt, lengths_of, requests_of, shares_of
from .sides import ASYNCEP, Length, Setting, Side
from .uneven import Timer, batch_of

STORED = {"fp8": "float8_e4m3fn", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """``cell``: of the best setting; ``best_first``: settings that should fit, by predicted tokens/s."""

    cell: dict[str, Any]
    best_first: list[Setting] = field(default_factory=list)


class Forecaster:
    """``profile``: rates of the machine that the cells are for."""

    def __init__(self, options: argparse.Namespace, spec: ModelSpec, profile: MachineProfile) -> None:
        self.options, self.spec, self.profile = options, spec, profile
        self.stored = STORED[options.precision]
        self.dtype = "float32" if options.precision == "fp32" else "bfloat16"
        self._mixed: dict[tuple[bool, int, int], list[list[Batch]]] = {}

    def budget(self, gpus: int, hbm_gib: float | None = None) -> Budget:
        kind = "cuda" if self.options.device == "cuda" else "cpu"
        host = int(self.options.assumed_host_gib * GIB) // gpus
        device = int((hbm_gib or self.options.assumed_hbm_gib) * GIB)
        return Budget(device_bytes=device, host_bytes=host, ranks=gpus, kind=kind)

    def spec_of(self, side: Side) -> ModelSpec:
        return replace(self.spec, layers=self.spec.layers[: side.layers])

    def forecast(self, side: Side, length: Length) -> Forecast:
        """The best setting of a side for requests of this length; says why where none fits."""
        rated: list[tuple[Setting, dict[str, Any]]] = []
        refused: dict[str, str] = {}
        for setting in settings_of(self.options, side):
            if setting.sweep_tokens < max(lengths_of(self.options, length)):
                continue
            try:
                rated.append((setting, self._cell(side, setting, length)))
            except MoePrefillError as error:
                refused[str(setting)] = str(error).splitlines()[0]
        head = cell_head(self.options, side, length)
        if not rated:
            return Forecast(cell=head | {"refused": refused})
        rated.sort(key=lambda each: -each[1]["predicted_tokens_per_s"])
        return Forecast(cell=head | rated[0][1], best_first=[setting for setting, _ in rated])

    def threshold(self, transport: Peer, tokens: int) -> int:
        """Tokens of a sweep of T, whole requests of ``tokens``, where all banks are sharded."""
        options, layers = self.options, self.spec.num_layers
        side = Side(part="threshold", strategy=ASYNCEP, gpus=options.gpus, layers=layers, residency="sharded")
        plan = self._plan(side, Setting(max(options.sweeps), min(options.chunks)))
        found = saturation(
            self.spec,
            with_chunks(self.profile, plan.sweep.chunk_rows),
            precision=self.precision,
            streaming=plan.streaming(transport),
            tokens_per_request=tokens,
            prune_last=False,
        )
        return -(-found.tokens // tokens) * tokens

    @property
    def weight_bytes(self) -> int:
        """Of all experts, which are nearly all of a model."""
        return self.spec.num_sparse_layers * bank_bytes(self.spec, self.stored)

    @property
    def precision(self) -> str:
        return PRECISIONS[self.stored]

    def _cell(self, side: Side, setting: Setting, length: Length) -> dict[str, Any]:
        spec, profile = self.spec_of(side), with_chunks(self.profile, setting.chunk_rows)
        timer = Timer(side=side, spec=spec, profile=profile, precision=self.precision)
        memory: dict[str, Any] = {}
        if side.strategy == ASYNCEP:
            plan = self._plan(side, setting)
            timer, memory = replace(timer, streaming=plan.streaming(side.transport)), planned_memory(plan)
        else:
            self._check_shares(side, setting)
        if isinstance(length, str):
            cell, flops_per_s = self._mixed_cell(timer, setting)
        else:
            tokens = setting.sweep_tokens // length * length
            batch = Batch.uniform(tokens, length, prune_last=False)
            cell, flops_per_s = (self._asyncep if timer.streaming else self._baseline)(timer, setting, batch)
        return {
            "sweep_tokens": setting.sweep_tokens,
            "chunk_rows": setting.chunk_rows,
            **({"micro_batches": setting.micro_batches} if side.strategy == "pp+pp" else {}),
            **memory,
            **cell,
            "predicted_mfu": flops_per_s / (side.gpus * profile.peak(self.precision)),
        }

    def _plan(self, side: Side, setting: Setting) -> ResidencyPlan:
        """As the rank's engine makes it."""
        config, budget = config_of(self.options, side, setting), self.budget(side.gpus, side.hbm_gib)
        return plan_for(config, self.spec_of(side), budget, dtype=self.dtype, profile=self.profile)

    def _check_shares(self, side: Side, setting: Setting) -> None:
        budget, sizes = self.budget(side.gpus), {"wanted": setting.sweep_tokens, "chunk_rows": setting.chunk_rows}
        for rank in range(side.gpus):
            share = share_of(self.spec_of(side), side.strategy, rank, side.gpus)  # type: ignore[arg-type]
            fit_share(share, budget.kind, budget.device_bytes, dtype=self.dtype, bank_dtype=self.stored, **sizes)

    def _asyncep(self, timer: Timer, setting: Setting, batch: Batch) -> tuple[dict[str, Any], float]:
        assert timer.streaming is not None
        gpus, precision = timer.side.gpus, timer.precision
        sweep = predict_sweep(timer.spec, batch, timer.profile, precision=precision, streaming=timer.streaming)
        cell = {
            "predicted_tokens_per_s": gpus * batch.num_tokens / sweep.sweep_s,
            "predicted_sweep_ms": 1e3 * sweep.sweep_s,
            "predicted_exposed_ms": 1e3 * sweep.exposed_s,
        }
        return cell, gpus * sweep.flops / sweep.sweep_s

    def _baseline(self, timer: Timer, setting: Setting, batch: Batch) -> tuple[dict[str, Any], float]:
        """A pipeline is filled and drained in each run, of twice the tokens."""
        side = timer.side
        found = predict_strategy(
            timer.spec,
            side.strategy,
            side.gpus,
            batch,
            timer.profile,
            precision=timer.precision,
            skew=side.skew,
            micro_batches=setting.micro_batches,
        )
        sweep_s = found.sweep_s + found.fill_s / max(1.0, self.options.run_tokens * shares_of(side) / found.tokens)
        cell = {
            "predicted_tokens_per_s": found.tokens / sweep_s,
            "predicted_sweep_ms": 1e3 * sweep_s,
            "predicted_transfer_ms": 1e3 * found.transfer_s,
        }
        return cell, found.flops / sweep_s

    def _mixed_cell(self, timer: Timer, setting: Setting) -> tuple[dict[str, Any], float]:
        """One run, sweep by sweep as the ranks form them."""
        side, spec, micro = timer.side, timer.spec, setting.micro_batches
        key = (side.owns_requests, shares_of(side), -(-setting.sweep_tokens // micro))
        if key not in self._mixed:
            element = DTYPE_BYTES[self.dtype]
            limits = memory_plan(spec, element, key[2], setting.chunk_rows).limits(spec)
            forming = Forming(limits=limits, rule=sharing_rule(spec, "off"))
            ranks = dealt(spec, side, requests_of(self.options, side, MIXED, spec.vocab_size))
            self._mixed[key] = [
                [
                    batch_of([own[index] for index in members], forming, spec.vocab_size, prune_last=False)
                    for members in forming.sweeps(own, range(len(own)))
                ]
                for own in (ranks if side.owns_requests else ranks[:1])
            ]
        batches = self._mixed[key]
        seconds = timer.seconds(batches)
        flops = sum(batch_flops(spec, batch) for own in batches for batch in own)
        tokens = sum(batch.num_tokens for own in batches for batch in own)
        return {"predicted_tokens_per_s": tokens / seconds, "predicted_run_s": seconds}, flops / seconds

    def resident_layers(self) -> int:
        """The most layers whose banks one GPU holds beside the largest sweep and chunks."""
        setting = Setting(max(self.options.sweeps), max(self.options.chunks))
        pins = Pins(residency="resident", max_sweep_tokens=setting.sweep_tokens, chunk_rows=setting.chunk_rows)
        for layers in range(self.spec.num_layers, 0, -1):
            spec = replace(self.spec, layers=self.spec.layers[:layers])
            try:
                plan_residency(spec, self.budget(1), dtype=self.dtype, bank_dtype=self.stored, pins=pins)
            except MoePrefillError:
                continue
            return layers
        return 1


def with_ratios(cells: list[dict[str, Any]], rate: str, ratio: str) -> list[dict[str, Any]]:
    """``ratio``: asyncep's ``rate`` over the cell's, where banks are sharded and the frontend, if any, is ours; same
    GPUs, skew, length and call. What an earlier call said of its cells stays.
    """

    def key(cell: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(cell.get(name) for name in ("part", "gpus", "layers", "dummy_skew", "tokens", "model", "command"))

    def is_ours(cell: dict[str, Any]) -> bool:
        kind = tuple(cell.get(name) for name in ("strategy", "residency", "transport"))
        return kind == (ASYNCEP, "sharded", "copy-engine") and cell.get("policy", "ours") == "ours"

    ours = {key(cell): cell[rate] for cell in cells if rate in cell and is_ours(cell)}
    return [
        {**cell, ratio: ours[key(cell)] / cell[rate]}
        if cell["strategy"] != ASYNCEP and rate in cell and key(cell) in ours
        else cell
        for cell in cells
    ]
