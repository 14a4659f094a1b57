"""``moe-prefill plan``: without torch, as tables and as JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_prefill.cli import main
from moe_prefill.machine import estimated_profile, save_profile
from moe_prefill.memory import GIB
from moe_prefill.residency import Budget, Pins, plan_residency

BIG = ["--model", "Qwen3-235B-A22B", "--quantization", "fp8"]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    fields: dict[str, Any] = json.loads(capsys.readouterr().out)
    return fields


def test_the_large_model_on_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *BIG, "--hbm-gib", "139", "--host-gib", "128", "--tokens-per-request", "4096")
    assert found["residency"].count("O") == pytest.approx(49, abs=3)  # for larger chunks
    assert found["peak_device_bytes"] == sum(found["device_bytes"].values()) <= 139 * GIB
    assert 93 * GIB <= found["host_bytes"]["pinned banks"] <= found["peak_host_bytes"] <= 128 * GIB
    assert found["sweep_tokens"] >= 65536
    assert found["saturation"]["tokens"] <= found["sweep_tokens"]
    assert found["saturation"]["t_paper"] > 0
    assert found["sweep_s"] == pytest.approx(found["compute_s"] + found["exposed_s"])
    assert found["profile"] == {"gpu": "H200", "estimated": True}


def test_people_see_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*BIG, "--hbm-gib", "79", "--gpus", "2", "--host-gib", "512"]
    found = planned(capsys, *arguments)
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert found["residency"] in said
    assert f"{found['sweep_tokens']:,} tokens, chunks of {found['chunk_rows']:,} rows" in said
    assert f"{found['peak_device_bytes'] / GIB:.2f} GiB of 79.00 GiB" in said
    assert f"{found['peak_host_bytes'] / GIB:.2f} GiB of 256.00 GiB" in said
    assert "estimated from its datasheet, not measured" in said
    assert "staged shards of 1.13 GiB" in said


def test_the_engine_makes_the_plan_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from moe_prefill.models import preset, spec_from_hf

    found = planned(capsys, "--model", "OLMoE-1B-7B", "--hbm-gib", "8", "--host-gib", "32", "--prefetch-depth", "2")
    budget = Budget(device_bytes=8 * GIB, host_bytes=32 * GIB)
    spec = spec_from_hf(preset("OLMoE-1B-7B"))
    plan = plan_residency(spec, budget, dtype="bfloat16", bank_dtype="bfloat16", pins=Pins(prefetch_depth=2))
    assert (found["residency"], found["bank_buffers"]) == (plan.map, 3)
    assert found["device_bytes"] == plan.device_bytes


def test_a_measured_profile_is_named_and_decides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    slow_host = replace(estimated_profile("H100"), is_estimated=False, date="2001-02-03")
    slow_host = replace(slow_host, transfers={**slow_host.transfers, "host": 10e9})
    save_profile(slow_host, file)
    arguments = ["--model", "Qwen3-30B-A3B", "--hbm-gib", "16", "--profile", str(file)]
    found = planned(capsys, *arguments)
    assert found["profile"] == {"gpu": "H100", "estimated": False}
    assert found["sweep_tokens"] > 131072  # the link is slow, and only larger sweeps hide it
    assert main(["plan", *arguments]) == 0
    assert "H100 (measured 2001-02-03)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--model", "no-such-model", "--hbm-gib", "80"], 5, "no-such-model"),
        (["--model", "Qwen3-30B-A3B"], 2, "--hbm-gib"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "-1"], 2, "must be positive"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "nan"], 2, "must be positive"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "inf"], 2, "must be positive and finite"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "8", "--gpus", "0"], 2, "must be positive"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "8", "--residency", "sharded"], 2, "needs at least two GPUs"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "16", "--residency", "RRR"], 2, "names 3 layers"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "16", "--residency", "resident"], 6, "resident banks: 54.00 GiB"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "16", "--host-gib", "8"], 6, "--host-gib; all banks take 54.00"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "3"], 6, "no sweep fits"),
        ([*BIG, "--hbm-gib", "139", "--max-sweep-tokens", "90000000"], 6, "the largest sweep that fits has"),
        ([*BIG, "--hbm-gib", "139", "--transport", "pigeon"], 2, "is not one of 'copy-engine', 'nccl'"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "80", "--quantization", "int4"], 2, "'int4' is not one of 'fp8'"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "80", "--gpu", "Abacus"], 2, "nothing is known of the speed"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "80", "--profile", "missing.json"], 2, "cannot be read"),
        (["--model", "Qwen3-30B-A3B", "--hbm-gib", "80", "--tokens-per-request", "0"], 2, "at least 1"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, complaint: str) -> None:
    assert main(["plan", *arguments]) == code
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_a_preset_is_planned_without_torch() -> None:
    code = (
        "import sys; from moe_prefill.cli import main; "
        "assert main(['plan', '--model', 'Qwen3-30B-A3B', '--hbm-gib', '16', '--json']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_directory_is_planned_from_its_config(capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(__file__).parents[2] / "examples/demo_model/checkpoint"
    assert planned(capsys, "--model", str(model), "--hbm-gib", "2")["residency"] == "R" * 6
