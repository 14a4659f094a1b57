"""Machine profiles: curves, files, refusals, and what is assumed of machines that nobody measured."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prefill.costmodel import Batch, layer_seconds, predict_sweep
from moe_prefill.errors import UsageError
from moe_prefill.machine import DATASHEETS, Curve, datasheet_peak, estimated_profile, load_profile, save_profile
from moe_prefill.models import preset, spec_from_hf
from tests.costmodel.models import machine_profile, model_spec

ROOT = Path(__file__).resolve().parents[2]

positive = st.floats(1e-3, 1e15)


@st.composite
def curves(draw) -> Curve:
    sizes = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=6)))
    return Curve(tuple(map(float, sizes)), tuple(draw(positive) for _ in sizes))


def test_a_curve_between_below_and_above_its_points():
    curve = Curve.of([(1000, 40.0), (10, 10.0)])
    assert math.isclose(curve.at(100), 20.0)  # half the way in the logarithm of the size
    assert curve.at(5) == pytest.approx(5.0)  # no faster than ten rows
    assert curve.at(1_000_000) == pytest.approx(40.0)
    np.testing.assert_allclose(curve.at(np.asarray([10.0, 1000.0])), [10.0, 40.0])


@given(curves(), st.floats(1e-2, 1e7), st.floats(1.0, 1e3))
def test_work_of_a_curve_is_bounded_by_its_points(curve, size, factor):
    assert curve.at(size) <= curve.best * (1 + 1e-9)
    inside = max(size, curve.sizes[0])
    assert min(curve.rates) * (1 - 1e-9) <= curve.at(inside)
    if size * factor <= curve.sizes[0]:  # less work takes no less time
        assert size * factor / curve.at(size * factor) == pytest.approx(size / curve.at(size))


@pytest.mark.parametrize(
    ("sizes", "rates"), [((), ()), ((1, 2), (1,)), ((2, 1), (1, 1)), ((1, 1), (1, 1)), ((0, 1), (1, 1)), ((1,), (0,))]
)
def test_what_is_no_curve(sizes, rates):
    with pytest.raises(ValueError, match="curve"):
        Curve(sizes, rates)


def test_a_profile_comes_back_from_its_file(tmp_path):
    profile = machine_profile(choices={"chunk_rows": 512, "attention": "flash2"})
    save_profile(profile, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == load_profile(tmp_path / "profile.json", gpu="cpu") == profile
    assert profile.chunk_rows == 512
    assert not profile.is_estimated


def test_a_profile_of_another_gpu_is_refused(tmp_path):
    save_profile(machine_profile(gpu="NVIDIA H100 80GB HBM3"), tmp_path / "p.json")
    with pytest.raises(
        UsageError, match=r"measured on 'NVIDIA H100 80GB HBM3', and this device is 'NVIDIA H200'; make"
    ):
        load_profile(tmp_path / "p.json", gpu="NVIDIA H200")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "format version 0, and this program reads 1"),
        ({"version": 2}, "format version 2, and this program reads 1"),
        ({"version": "1"}, "format version '1'"),
        ({"gemm": {"float16": {"sizes": [1], "rates": [1]}}}, "precision 'float16'"),
        ({"gemm": {"float32": {"sizes": [2, 1], "rates": [1, 1]}}}, "do not ascend"),
        ({"gemm": {"float32": [1, 2]}}, "damaged"),
        ({"gemm": None}, "damaged"),
        ({"elementwise": {"float32": {"sizes": [1], "rates": [float("nan")]}}}, "not positive"),
        ({"transfers": {"pigeon": 1.0}}, "transport 'pigeon' is not one of host"),
        ({"transfers": {"host": 0}}, "host is 0; it must be a positive number"),
        ({"memory_bandwidth": "fast"}, "memory_bandwidth is 'fast'"),
        ({"layer_overhead_s": -1}, "layer_overhead_s is -1"),
        ({"choices": {"chunk_rows": 0}}, "chunk_rows is 0"),
        ({"choices": 3}, "damaged"),
        ({"gpu": 3}, "gpu is 3, not a string"),
        ({"is_estimated": "no"}, "is_estimated is 'no'"),
        ({"surprise": 1}, r"unknown: \['surprise'\]"),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path, change, message):
    save_profile(machine_profile(), tmp_path / "p.json")
    raw = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps(raw | change))
    with pytest.raises(UsageError, match=message) as error:
        load_profile(tmp_path / "p.json")
    assert "moe-prefill calibrate" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "not a machine profile"), ("{}", "no field 'version'")]
)
def test_what_is_no_profile_is_refused(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_profile(tmp_path / "p.json")
    with pytest.raises(UsageError, match="cannot be read"):
        load_profile(tmp_path / "absent.json")


def test_a_profile_without_a_field_is_refused(tmp_path):
    save_profile(machine_profile(), tmp_path / "p.json")
    raw = json.loads((tmp_path / "p.json").read_text())
    del raw["bank_bytes"]
    (tmp_path / "p.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=r"fields missing: \['bank_bytes'\]"):
        load_profile(tmp_path / "p.json")


def test_launches_hide_behind_what_a_gpu_computes():
    """A layer of 3 ms whose launches take 2 ms, and one of 1 ms."""
    gpu, cpu = (machine_profile(gpu=name, layer_overhead_s=2e-3) for name in ("NVIDIA test", "cpu"))
    assert [1e3 * gpu.layer_s(busy_s) for busy_s in (3e-3, 1e-3)] == [3, 2]
    assert [1e3 * cpu.layer_s(busy_s) for busy_s in (3e-3, 1e-3)] == [5, 3]
    spec, batch = model_spec(), Batch.uniform(64, 64, prune_last=False)
    free, busy = (
        layer_seconds(spec, 0, batch, dataclasses.replace(gpu, layer_overhead_s=seconds), "float32")
        for seconds in (0.0, 1.0)
    )
    assert sum(busy.values()) == pytest.approx(1.0)
    assert {**busy, "elementwise": 0} == {**free, "elementwise": 0}
    hidden = layer_seconds(spec, 0, batch, dataclasses.replace(gpu, layer_overhead_s=1e-9), "float32")
    assert hidden == pytest.approx(free)


@pytest.mark.parametrize("gpu", [*(f"NVIDIA {name} test" for name in DATASHEETS), "cpu"])
def test_estimates_stay_below_the_datasheet_and_say_so(gpu, tmp_path):
    profile = estimated_profile(gpu)
    assert profile.is_estimated
    for curves_of in (profile.gemm, profile.grouped, profile.attention):
        assert {"float32", "bfloat16"} <= set(curves_of)
        assert all(curve.best <= profile.peak(precision) for precision, curve in curves_of.items())
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json", gpu=gpu) == profile


def test_an_estimate_for_hopper_is_near_what_was_measured_there():
    """One H200: plain products 764 TFLOP/s (650 in the long run) in bfloat16, 1,420 in float8; grouped 582 to 762 and
    944 to 1,287 TFLOP/s; FlashAttention 3 at 4K 632; pinned copies 54 GB/s, a peer's memory 370-394 GB/s.
    """
    profile = estimated_profile("NVIDIA H200")
    assert 600e12 < profile.rates("gemm", "bfloat16").at(8192) < 764e12
    assert 582e12 < profile.rates("grouped", "bfloat16").at(1024) < 762e12
    assert 944e12 < profile.rates("grouped", "float8").at(1024) < 1287e12
    assert profile.rates("attention", "float8") == profile.rates("attention", "bfloat16")
    assert 1300e12 < profile.rates("gemm", "float8").at(8192) < 1470e12
    assert 500e12 < profile.rates("attention", "float8").at(4096) < 632e12
    assert estimated_profile("NVIDIA A100").rates("attention", "bfloat16").at(4096) < 0.35 * 312e12, "FlashAttention 2"
    assert 50e9 < profile.bandwidth("host") < 55e9
    assert 360e9 < profile.bandwidth("copy-engine") < 394e9


def measured_cells():
    """Spec, batch and precision of every cell of benchmarks/results/hopper.json without sharing, on one H200."""
    report = json.loads((ROOT / "benchmarks/results/hopper.json").read_text())
    for cell in report["cells"]:
        if cell.get("gpu", report["gpu"]) != "NVIDIA H200" or "siblings" in cell:
            continue
        spec = spec_from_hf(preset(cell["model"]))
        spec = dataclasses.replace(spec, layers=spec.layers[: cell["layers"]])
        batch = Batch.uniform(cell["sweep_tokens"], cell["tokens"], prune_last=False)
        yield spec, batch, {"bf16": "bfloat16", "fp8": "float8"}[cell["precision"]], cell


def test_an_estimate_predicts_the_sweeps_that_were_measured():
    """Within 10%."""
    for spec, batch, precision, cell in measured_cells():
        choices = {"chunk_rows": cell["chunk_rows"]}
        profile = dataclasses.replace(estimated_profile("NVIDIA H200"), choices=choices)
        sweep = predict_sweep(spec, batch, profile, precision=precision)
        assert 1e3 * sweep.sweep_s == pytest.approx(cell["sweep_ms"], rel=0.1), (cell["model"], cell["tokens"])


def test_a_calibrated_profile_predicts_the_sweeps_that_were_measured():
    """Those of its model and precision within 7.5%; it has no rates beyond 32,768 rows, where products are faster."""
    measured = load_profile(ROOT / "benchmarks/results/profile_h200_qwen3_235b_fp8.json", gpu="NVIDIA H200")
    mine = [each for each in measured_cells() if (each[3]["model"], each[2]) == (measured.model, "float8")]
    assert len(mine) == 3
    for spec, batch, precision, cell in mine:
        profile = dataclasses.replace(measured, choices={"chunk_rows": cell["chunk_rows"]})
        sweep = predict_sweep(spec, batch, profile, precision=precision)
        assert 1e3 * sweep.sweep_s == pytest.approx(cell["sweep_ms"], rel=0.075), cell["tokens"]


def test_unknown_devices_have_no_estimate():
    with pytest.raises(UsageError, match="nothing is known of the speed of 'Abacus 3000', only of B200, H200"):
        estimated_profile("Abacus 3000")
    assert datasheet_peak("Abacus 3000", "bfloat16") is None
    assert datasheet_peak("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
