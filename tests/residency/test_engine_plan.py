"""The engine is built from the plan: what does not fit is refused before weights load, and a plan's sizes can be given
again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moe_prefill.config import EngineConfig
from moe_prefill.engine import build, memory
from moe_prefill.errors import PlanError, UsageError
from moe_prefill.memory import GIB

MODEL = Path(__file__).resolve().parents[2] / "examples/demo_model/checkpoint"
CONFIG = EngineConfig(model=str(MODEL), device="cpu", threads=1)


def test_a_smaller_memory_with_the_sizes_of_the_first_plan_is_the_same_plan():
    with_much, with_little = (build.build_engine(dataclasses.replace(CONFIG, host_gib=gib)) for gib in (1.0, 0.05))
    assert with_much.plan_digest != with_little.plan_digest
    sizes = {name: getattr(with_little.limits, name) for name in ("max_sweep_tokens", "chunk_rows")}
    again = build.build_engine(dataclasses.replace(CONFIG, host_gib=1.0, **sizes))
    assert again.plan_digest == with_little.plan_digest


def test_what_does_not_fit_is_refused_before_weights_load(monkeypatch):
    monkeypatch.setattr(build, "load_weights", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(PlanError, match="does not fit on CPU: with banks 6 resident") as refused:
        build.build_engine(dataclasses.replace(CONFIG, host_gib=0.01))
    assert "embedding and head: 4.0 MiB" in str(refused.value)
    assert "a larger --host-gib" in str(refused.value)
    assert "GPU" not in str(refused.value)
    assert "--hbm-gib" not in str(refused.value)
    with pytest.raises(PlanError, match=r"has [\d,]+ tokens; use a smaller --max-sweep-tokens, a larger --host-gib"):
        build.build_engine(dataclasses.replace(CONFIG, host_gib=0.05, max_sweep_tokens=1 << 26))
    with pytest.raises(UsageError, match="names 2 layers, and the model has 6"):
        build.build_engine(dataclasses.replace(CONFIG, residency="resident,resident"))


def test_a_host_pool_larger_than_the_host_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "total_host_bytes", lambda: 64 * GIB)
    assert memory.host_pool_bytes(64) == 64 * GIB
    with pytest.raises(UsageError, match=r"host_gib is 65, and this host has 64.0 GiB"):
        memory.host_pool_bytes(65)
    with pytest.raises(UsageError, match="host_gib is 65"):
        build.build_engine(dataclasses.replace(CONFIG, host_gib=65.0))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1073741824", "memory.current": "1000"}, GIB),
        ({"memory.limit_in_bytes": "1073741824", "memory.usage_in_bytes": "1000"}, GIB),
    ],
)
def test_the_limit_of_a_control_group_counts(monkeypatch, tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", (tmp_path,))
    monkeypatch.setattr(memory, "_meminfo", lambda field: 64 * GIB)
    assert memory.total_host_bytes() == expected
    assert memory.available_host_bytes() == expected - 1000
    assert memory.free_bytes(torch.device("cpu"), None) == (expected - 1000) // 2


def test_where_memory_grows_on_use_nothing_says_how_much_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUPS", (tmp_path / "none",))
    monkeypatch.setattr(memory, "_GROWING", (tmp_path,))
    monkeypatch.setattr(memory, "_meminfo", lambda field: 64 * GIB)
    assert memory.total_host_bytes() == 64 * GIB
    (tmp_path / "virtio0").mkdir()
    assert memory.total_host_bytes() is None
