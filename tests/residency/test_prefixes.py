"""The pool of prefixes in the plan: counted, refused with numbers, and by default never in the way of banks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moe_prefill.cli.plan import PlanOptions, show_plan
from moe_prefill.config import EngineConfig
from moe_prefill.engine import build_engine
from moe_prefill.errors import PlanError, UsageError
from moe_prefill.memory import GIB, kv_block_bytes
from moe_prefill.models import preset, spec_from_hf
from moe_prefill.residency import Budget, plan_for

DEMO = Path(__file__).resolve().parents[2] / "examples/demo_model/checkpoint"
SMALL = spec_from_hf(preset("Qwen3-30B-A3B"))
LARGE = spec_from_hf(preset("Qwen3-235B-A22B"))


def plan(spec, gib: float, *, host_gib: float = 0.0, ranks: int = 1, **settings):
    budget = Budget(device_bytes=int(gib * GIB), host_bytes=int(host_gib * GIB) // ranks, ranks=ranks)
    return plan_for(EngineConfig(model="m", **settings), spec, budget, dtype="bfloat16")


def test_a_block_is_16_tokens_of_all_layers():
    assert kv_block_bytes(SMALL, 2) == 48 * 16 * 2 * 4 * 128 * 2


def test_what_is_asked_for_is_counted_beside_a_smaller_sweep():
    without, beside = plan(SMALL, 79), plan(SMALL, 79, kv_gib=6)
    assert without.kv_blocks == without.device_bytes["prefix keys and values"] == 0
    assert beside.kv_blocks == 6 * GIB // kv_block_bytes(SMALL, 2)
    assert beside.device_bytes["prefix keys and values"] == beside.kv_blocks * kv_block_bytes(SMALL, 2)
    assert beside.peak_device_bytes <= beside.budget.device_bytes
    assert beside.largest_sweep_tokens < without.largest_sweep_tokens


def test_what_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(PlanError, match=r"prefix keys and values: 70\.\d+ GiB\n") as refused:
        plan(SMALL, 79, kv_gib=70.2)
    assert "use a smaller --kv-gib (now 70." in str(refused.value)
    with pytest.raises(UsageError, match=r"--kv-gib is 0.001, and 16 tokens of this model take 1.5 MiB; give more"):
        plan(SMALL, 79, kv_gib=0.001)
    with pytest.raises(UsageError, match="kv_gib is -1; it must be 0"):
        EngineConfig(model="m", kv_gib=-1)
    with pytest.raises(UsageError, match=r"kv_gib is 2; strategy tp\+tp keeps no prefixes"):
        EngineConfig(model="m", kv_gib=2, strategy="tp+tp", gpus=2)


def test_jobs_keep_nothing_unless_asked():
    assert plan(SMALL, 139).kv_blocks == 0
    assert plan(SMALL, 139, keep_prefixes=True, kv_gib=0).kv_blocks == 0


@pytest.mark.parametrize(
    ("spec", "gib", "ranks", "part"),
    [(SMALL, 139, 1, 12), (SMALL, 79, 1, 12), (LARGE, 139, 8, 12), (SMALL, 62.5, 1, 24), (SMALL, 60, 1, None)],
)
def test_by_default_the_pool_takes_what_costs_neither_banks_nor_sweeps(spec, gib, ranks, part):
    settings = {"quantization": "fp8"} if spec is LARGE else {}
    without = plan(spec, gib, ranks=ranks, **settings)
    kept = plan(spec, gib, ranks=ranks, keep_prefixes=True, **settings)
    most = 0 if part is None else kept.budget.device_bytes // part // kv_block_bytes(spec, 2)
    assert kept.kv_blocks == most
    assert set(kept.levels) <= set(without.levels)
    assert kept.sweep.max_sweep_tokens >= min(without.sweep.max_sweep_tokens, 65536)


def test_the_engine_has_the_planned_pool_and_its_size_can_be_given_again():
    config = EngineConfig(model=str(DEMO), device="cpu", threads=1, host_gib=1.0, keep_prefixes=True)
    engine = build_engine(config)
    assert engine.kv_blocks == engine.residency.kv_blocks > 100
    limits = engine.limits
    assert limits.kv_gib * GIB == engine.residency.device_bytes["prefix keys and values"]
    sizes = {name: getattr(limits, name) for name in ("max_sweep_tokens", "chunk_rows", "kv_gib")}
    again = build_engine(dataclasses.replace(config, host_gib=2.0, **sizes))
    assert again.plan_digest == engine.plan_digest
    assert again.limits == limits
    for each in (engine, again):
        each.close()


def test_the_plan_command_counts_it(capsys):
    config = EngineConfig(model="Qwen3-30B-A3B", memory_gib=79, gpus=1, kv_gib=6)
    show_plan(PlanOptions(config=config, gpu="H200", tokens_per_request=1024, json=True))
    shown = json.loads(capsys.readouterr().out)
    assert shown["kv_blocks"] == 6 * GIB // kv_block_bytes(SMALL, 2)
    assert shown["device_bytes"]["prefix keys and values"] == 6 * GIB
