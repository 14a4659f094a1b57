"""What the cost model says of every cell, before any of them is run; needs no GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from moe_prefill.core import ModelSpec
from moe_prefill.costmodel import Batch, predict_strategy, predict_sweep
from moe_prefill.errors import MoePrefillError
from moe_prefill.machine import MachineProfile
from moe_prefill.memory import GIB
from moe_prefill.residency import Budget, Pins, plan_residency
from moe_prefill.residency.speed import PRECISIONS, with_chunks
from moe_prefill.strategies import share_of
from moe_prefill.strategies.memory import fit_share

from .contenders import ASYNCEP, Setting, Side, settings_of
from .measuring import cell_head

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

    def budget(self, gpus: int) -> Budget:
        kind = "cuda" if self.options.device == "cuda" else "cpu"
        host = int(self.options.assumed_host_gib * GIB) // gpus
        return Budget(device_bytes=int(self.options.assumed_hbm_gib * GIB), host_bytes=host, ranks=gpus, kind=kind)

    def spec_of(self, side: Side) -> ModelSpec:
        return replace(self.spec, layers=self.spec.layers[: side.layers])

    def forecast(self, side: Side, tokens: int) -> Forecast:
        """The best setting of a side for requests of this length; says why where none fits."""
        rated: list[tuple[Setting, dict[str, Any]]] = []
        refused: dict[str, str] = {}
        for setting in settings_of(self.options, side):
            if setting.sweep_tokens < tokens:
                continue
            try:
                rated.append((setting, self._cell(side, setting, tokens)))
            except MoePrefillError as error:
                refused[str(setting)] = str(error).splitlines()[0]
        head = cell_head(self.options, side, tokens)
        if not rated:
            return Forecast(cell=head | {"refused": refused})
        rated.sort(key=lambda each: -each[1]["predicted_tokens_per_s"])
        return Forecast(cell=head | rated[0][1], best_first=[setting for setting, _ in rated])

    def _cell(self, side: Side, setting: Setting, tokens: int) -> dict[str, Any]:
        spec, profile = self.spec_of(side), with_chunks(self.profile, setting.chunk_rows)
        batch = Batch.uniform(setting.sweep_tokens // tokens * tokens, tokens, prune_last=False)
        found = self._asyncep if side.strategy == ASYNCEP else self._baseline
        cell, flops_per_s = found(side, setting, spec, profile, batch)
        return {
            "sweep_tokens": setting.sweep_tokens,
            "chunk_rows": setting.chunk_rows,
            **({"micro_batches": setting.micro_batches} if side.strategy == "pp+pp" else {}),
            **cell,
            "predicted_mfu": flops_per_s / (side.gpus * profile.peak(PRECISIONS[self.stored])),
        }

    def _asyncep(
        self, side: Side, setting: Setting, spec: ModelSpec, profile: MachineProfile, batch: Batch
    ) -> tuple[dict[str, Any], float]:
        pins = Pins(residency=side.residency, max_sweep_tokens=setting.sweep_tokens, chunk_rows=setting.chunk_rows)
        plan = plan_residency(spec, self.budget(side.gpus), dtype=self.dtype, bank_dtype=self.stored, pins=pins)
        streaming = plan.streaming(self.options.transport)
        sweep = predict_sweep(spec, batch, profile, precision=PRECISIONS[self.stored], streaming=streaming)
        levels = ", ".join(f"{plan.count(level)} {level}" for level in dict.fromkeys(filter(None, plan.levels)))
        cell = {
            "levels": levels,
            "predicted_tokens_per_s": side.gpus * batch.num_tokens / sweep.sweep_s,
            "predicted_sweep_ms": 1e3 * sweep.sweep_s,
            "predicted_exposed_ms": 1e3 * sweep.exposed_s,
        }
        return cell, side.gpus * sweep.flops / sweep.sweep_s

    def _baseline(
        self, side: Side, setting: Setting, spec: ModelSpec, profile: MachineProfile, batch: Batch
    ) -> tuple[dict[str, Any], float]:
        """A pipeline is filled and drained in each run, of twice the tokens."""
        budget, sizes = self.budget(side.gpus), {"wanted": setting.sweep_tokens, "chunk_rows": setting.chunk_rows}
        for rank in range(side.gpus):
            share = share_of(spec, side.strategy, rank, side.gpus)  # type: ignore[arg-type]
            fit_share(share, budget.kind, budget.device_bytes, dtype=self.dtype, bank_dtype=self.stored, **sizes)
        found = predict_strategy(
            spec,
            side.strategy,
            side.gpus,
            batch,
            profile,
            precision=PRECISIONS[self.stored],
            skew=side.skew,
            micro_batches=setting.micro_batches,
        )
        run_tokens = self.options.run_tokens * side.gpus * (2 if side.strategy == "pp+pp" else 1)
        sweep_s = found.sweep_s + found.fill_s / max(1.0, run_tokens / found.tokens)
        cell = {
            "predicted_tokens_per_s": found.tokens / sweep_s,
            "predicted_sweep_ms": 1e3 * sweep_s,
            "predicted_transfer_ms": 1e3 * found.transfer_s,
        }
        return cell, found.flops / sweep_s

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
    """``ratio``: asyncep's ``rate`` over the cell's, where banks are sharded, same GPUs, skew and length."""

    def key(cell: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(cell.get(name) for name in ("part", "gpus", "layers", "dummy_skew", "tokens", "model"))

    ours = {key(c): c[rate] for c in cells if (c["strategy"], c.get("residency")) == (ASYNCEP, "sharded") and rate in c}
    return [
        {**cell, ratio: ours[key(cell)] / cell[rate]}
        if cell["strategy"] != ASYNCEP and rate in cell and key(cell) in ours
        else cell
        for cell in cells
    ]


def sides_of(options: argparse.Namespace, depth: int, resident_layers: int) -> Iterator[Side]:
    """Everything that is compared, part by part. ``depth``: of the model."""
    lengths = tuple(options.tokens)
    if "strategies" in options.parts:
        for skew in options.skews:
            for strategy in options.strategies:
                for residency in options.residencies if strategy == ASYNCEP else [None]:
                    yield Side(
                        part="strategies",
                        strategy=strategy,
                        gpus=options.gpus,
                        skew=skew,
                        layers=depth,
                        lengths=lengths,
                        residency=residency,
                    )
    if "scaling" in options.parts:
        few = min(resident_layers, depth)
        one = (min(lengths, key=lambda tokens: abs(tokens - 4096)),)
        whole = [(1, "auto", depth), (options.gpus, "sharded", depth)] if few < depth else []
        for gpus, residency, layers in sorted(
            [(1, "resident", few), (options.gpus, "sharded", few), *whole], key=lambda each: -each[0]
        ):
            yield Side(
                part="scaling", strategy=ASYNCEP, gpus=gpus, skew=1.0, layers=layers, lengths=one, residency=residency
            )
