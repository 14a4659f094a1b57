"""The time that a dry run predicts: where its rates come from, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moe_prefill.cli import main
from moe_prefill.cli.job_time import predict_job
from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.errors import UsageError
from moe_prefill.machine import estimated_profile, save_profile


@pytest.fixture
def dry_run(tmp_path: Path, model: Path):
    table = tmp_path / "in.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([f"spam text {i}"] for i in range(20))])
    given = ["--model", str(model), "--labels", "ham,spam", "--device", "cpu", "--dry-run"]
    return lambda *more: main(["classify", str(table), *given, *more])


def test_without_a_profile_the_time_is_an_estimate(dry_run, capsys):
    assert dry_run() == 0
    said = capsys.readouterr().out
    assert "(cpu, estimated, not measured)" in said
    assert "sharing is counted within the sample" in said


def test_with_a_profile_the_time_is_that_machines(dry_run, tmp_path, capsys):
    path = tmp_path / "profile.json"
    save_profile(dataclasses.replace(estimated_profile("cpu"), is_estimated=False, date="2026-11-24"), path)
    assert dry_run("--profile", str(path), "--gpus", "2") == 0
    assert "(2 x cpu, measured 2026-11-24)" in capsys.readouterr().out


def test_another_machines_profile_is_refused(dry_run, tmp_path, capsys):
    path = tmp_path / "profile.json"
    save_profile(estimated_profile("NVIDIA H200"), path)
    assert dry_run("--profile", str(path)) == 2
    assert "measured on 'NVIDIA H200', and this device is 'cpu'" in capsys.readouterr().err


def requests(count: int, prefix: int) -> list[AtomicRequest]:
    tokens = np.random.default_rng(0).integers(0, 200, (count, 300)).astype(np.int32)
    tokens[:, :prefix] = 7
    return [AtomicRequest.candidates(row, [1, 2]) for row in tokens]


def predicted(sample: list[AtomicRequest], copies: int = 1, **settings) -> float:
    config = EngineConfig(model="Qwen3-30B-A3B", load_format="dummy", device="cpu", num_layers=2, **settings)
    found = predict_job(config, sample, copies)
    assert found is not None
    return found.sample_s


def test_shared_prefixes_make_a_job_shorter_unless_sharing_is_off():
    alone, shared = requests(16, 0), requests(16, 280)
    assert predicted(shared) < 0.5 * predicted(alone)
    assert predicted(shared, sharing="off") == pytest.approx(predicted(alone))


def test_a_small_sample_of_a_large_job_is_timed_in_full_sweeps():
    assert predicted(requests(1, 0), copies=1000) < predicted(requests(1, 0))
    several = predicted(requests(16, 0), max_sweep_tokens=1200)
    assert predicted(requests(16, 0)) < several <= 4 * predicted(requests(16, 0))
    assert predicted(requests(16, 0), gpus=2) == pytest.approx(predicted(requests(16, 0)) / 2)


def test_a_profile_without_8_bit_experts_is_refused_where_they_are_asked_for():
    with pytest.raises(UsageError, match="no float8 rate for grouped"):
        predicted(requests(1, 0), quantization="fp8")
