"""Calibration on the CPU with the demo model: what it writes, what it prints, and that it agrees with itself."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from moe_prefill import ops
from moe_prefill.calibrate import Grid, calibrate, kernels, measure, operations
from moe_prefill.calibrate.operations import LayerBench, alike, layer_batch, one_layer, without_feed_forward
from moe_prefill.cli import main
from moe_prefill.costmodel import layer_seconds, layer_work, predict_sweep
from moe_prefill.engine.load import open_model
from moe_prefill.errors import UsageError
from moe_prefill.machine import Curve, load_profile
from moe_prefill.memory import memory_plan
from moe_prefill.ops import flash
from moe_prefill.residency import bank_bytes
from tests.costmodel.models import machine_profile, model_spec

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
CPU = torch.device("cpu")
SMALL = Grid(rows=(32, 256), lengths=(16, 64), chunks=(128, 256), budget_s=0.01)


def test_every_rate_is_measured_and_the_profile_can_be_used():
    spec, _ = open_model(DEMO, "dummy")
    steps: list[str] = []
    found = calibrate(spec, CPU, torch.float32, model="demo", command="test", grid=SMALL, progress=steps.append)
    assert (found.gpu, found.model, found.is_estimated) == ("cpu", "demo", False)
    assert found.gemm["float32"].sizes == (32, 256)
    assert found.grouped["float32"].sizes == tuple(rows * spec.top_k / spec.num_experts for rows in SMALL.rows)
    assert found.attention["float32"].sizes == (16, 64)
    assert set(found.elementwise["float32"].sizes) == {32, 256, found.chunk_rows}
    assert found.chunk_rows in SMALL.chunks
    assert set(found.transfers) == {"host", "local", "copy-engine"}
    assert found.bank_bytes == bank_bytes(spec, "float32")
    assert len(steps) == 7
    prediction = predict_sweep(spec, layer_batch(1000), found, precision="float32")
    assert prediction.compute_s > spec.num_layers * found.layer_overhead_s


@pytest.mark.parametrize("blocks", [False, True])
def test_float8_experts_are_measured_beside_the_rest(blocks, monkeypatch):
    monkeypatch.setattr(ops, "blocks_refused", lambda *_: None if blocks else "not asked for")
    spec, _ = open_model(DEMO, "dummy")
    found = calibrate(spec, CPU, torch.float32, model="demo", command="test", float8=True, grid=SMALL)
    assert [*found.grouped] == [*found.elementwise] == ["float32", "float8"]
    assert [*found.gemm] == ["float32", "float8"]
    assert [*found.attention] == ["float32"]
    assert found.bank_bytes == bank_bytes(spec, "float8_e4m3fn")
    assert predict_sweep(spec, layer_batch(1000), found, precision="float8").compute_s > 0


def test_whole_layers_are_predicted_as_they_were_measured(monkeypatch):
    """Where products leave room, elementwise work gets the rest: the layer's predicted time is the one measured."""
    spec, _ = open_model(DEMO, "dummy")
    monkeypatch.setattr(LayerBench, "layer", lambda self, tokens, chunk_rows: tokens * 1e-3)
    found = calibrate(spec, CPU, torch.float32, model="demo", command="test", grid=SMALL)
    for tokens in (32, 128):
        parts = layer_seconds(one_layer(spec), 0, layer_batch(tokens), found, "float32")
        assert sum(parts.values()) == pytest.approx(tokens * 1e-3)


@pytest.fixture
def bench() -> LayerBench:
    spec, _ = open_model(DEMO, "dummy")
    return LayerBench(spec, CPU, torch.float32, 0.01)


def on_gpu(bench: LayerBench, monkeypatch) -> None:
    """Only what reads the kind of device believes it."""
    monkeypatch.setattr(bench, "device", torch.device("cuda"))


def fast_profile(overhead_s: float):
    """A GPU whose products take next to nothing."""
    free = {kind: {"float32": Curve.constant(1e30)} for kind in ("gemm", "grouped", "attention")}
    facts = {"memory_bandwidth": 1e12, "layer_overhead_s": overhead_s, "choices": {"chunk_rows": 256}}
    return machine_profile(gpu="NVIDIA test", **facts, **free)


def products_s(bench: LayerBench, rows: int, profile) -> float:
    parts = layer_seconds(bench.spec, 0, layer_batch(rows), profile, "float32")
    return sum(taken for part, taken in parts.items() if part != "elementwise")


def moved(bench: LayerBench, rows: int) -> tuple[int, int]:
    """Bytes of elementwise work on ``rows`` rows, and of that outside of the feed-forward."""
    specs = (bench.spec, without_feed_forward(bench.spec))
    all_, least = (layer_work(spec, 0, layer_batch(rows), "float32")["elementwise"].bytes for spec in specs)
    return all_, least


def test_on_a_gpu_a_layer_takes_its_launches_or_its_work(bench, monkeypatch):
    """Up to 100 rows launches take 5 ms, beyond a row takes 0.05 ms: each size is predicted as it was measured, though
    the fixed time is neither added to larger layers nor taken from what they do.
    """
    on_gpu(bench, monkeypatch)
    monkeypatch.setattr(bench, "layer", lambda tokens, chunk_rows: max(5e-3, tokens * 5e-5))
    grid = dataclasses.replace(SMALL, rows=(32, 64, 256, 1024))
    said: list[str] = []
    found = measure._whole_layers(bench, grid, fast_profile(0.0), lambda step: None, said.append)
    assert (found.layer_overhead_s, said) == (5e-3, [])
    for rows, taken_s in ((16, 5e-3), (64, 5e-3), (256, 12.8e-3), (1024, 51.2e-3)):
        at_once = dataclasses.replace(found, choices={"chunk_rows": rows})
        parts = layer_seconds(bench.spec, 0, layer_batch(rows), at_once, "float32")
        assert sum(parts.values()) == pytest.approx(taken_s), rows
    left_s = 12.8e-3 - products_s(bench, 256, found)
    assert found.elementwise["float32"].at(256) == pytest.approx(moved(bench, 256)[0] / left_s)


def test_rows_stay_as_they_are_while_a_layer_is_timed(bench, monkeypatch):
    """Else those of a request would become equal, and their experts the same few."""
    rows_TD = bench._random(64, bench.spec.hidden_size)
    kept = rows_TD.clone()
    monkeypatch.setattr(bench, "_random", lambda *shape: rows_TD)

    def often(work) -> float:
        for _ in range(200):
            work()
        return 1.0

    monkeypatch.setattr(bench, "_seconds", often)
    assert bench.layer(64, 64) == 1.0
    torch.testing.assert_close(rows_TD, kept, rtol=1e-3, atol=1e-3)


def test_what_is_fused_into_products_is_faster_than_memory(bench, monkeypatch):
    """A layer that takes one and a half times what its norms and rotation alone would beside its products."""
    on_gpu(bench, monkeypatch)
    all_, least = moved(bench, 256)
    assert 0 < 2 * least < all_
    profile = fast_profile(0.0)
    taken_s = products_s(bench, 256, profile) + 1.5 * least / 1e12
    monkeypatch.setattr(bench, "layer", lambda tokens, chunk_rows: taken_s)
    rate, too_long = bench.elementwise(profile, 256)
    assert rate == pytest.approx(1e12 * all_ / (1.5 * least))
    assert (rate > 1e12, too_long) == (True, 0.0)


def test_parts_that_take_longer_alone_than_the_layer_are_said(bench, monkeypatch):
    """A layer of 10 ms whose products took 12 ms alone."""
    on_gpu(bench, monkeypatch)
    profile = dataclasses.replace(fast_profile(0.0), attention={"float32": Curve.constant(1.0)})
    rate = products_s(bench, 256, profile) / 12e-3
    slow = dataclasses.replace(profile, attention={"float32": Curve.constant(rate)})
    monkeypatch.setattr(bench, "layer", lambda tokens, chunk_rows: 10e-3 if tokens == 256 else 1e-3)
    all_, least = moved(bench, 256)
    reached, too_long = bench.elementwise(slow, 256)
    assert reached == pytest.approx(1e12 * all_ / least)
    assert too_long == pytest.approx(0.2, abs=0.01)
    said: list[str] = []
    measure._whole_layers(bench, dataclasses.replace(SMALL, rows=(256,)), slow, lambda step: None, said.append)
    assert said == [
        "float32: the parts of a layer of 256 rows take 20% longer alone than in it, and predictions by as much"
    ]


def test_experts_are_timed_by_what_an_engine_runs(bench, monkeypatch):
    """In their own precision by the chosen kernel from tokens to rows; in float8 rows are wide where the device
    multiplies no float8.
    """
    calls: list[tuple[int, int]] = []

    def rows_of(x_TD, order, gate_up, down):
        calls.append((len(x_TD), int(order.ends_E[-1])))
        return x_TD

    monkeypatch.setattr(operations, "expert_rows", rows_of)
    monkeypatch.setattr(LayerBench, "_seconds", lambda self, work: (work(), 0.5)[1])
    spec = bench.spec
    flops = 6 * 64 * spec.top_k * spec.hidden_size * spec.expert_size
    assert bench.grouped(64) == flops / 0.5
    assert calls == [(64, 64 * spec.top_k)]
    narrow = LayerBench(spec, CPU, torch.float32, 0.01, float8=True)
    assert narrow.grouped(64) == flops / (2 * 0.5), "two products"
    seen: list[torch.Tensor | None] = []
    monkeypatch.setattr(ops, "scaled_grouped_mm", lambda rows, scale, *rest: seen.append(scale))
    monkeypatch.setattr(ops, "has_float8", lambda device: False)
    narrow.grouped(64)
    assert seen == [None, None]
    assert len(calls) == 1


def test_a_gpu_is_measured_up_to_the_largest_chunks_of_a_plan():
    grid = Grid.of(torch.device("cuda"))
    assert grid.rows == (64, 256, 1024, 4096, 16384, 32768, 65536)
    assert max(grid.chunks) == 32768
    assert max(Grid.of(CPU).rows) == max(Grid.of(CPU).chunks) == 4096


def test_sizes_without_memory_are_left_out_and_said(bench, monkeypatch):
    """A GPU with what 2,048 rows need twice, half of it free and half of it in torch's cache."""
    assert bench.fits(1 << 40), "a CPU"
    needed = 2 * memory_plan(bench.spec, 4, 2048, 2048).num_bytes
    on_gpu(bench, monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed // 2, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000 + math.ceil(needed / 2))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    said: list[str] = []
    grid = Grid(rows=(64, 2048, 2049), lengths=(16,), chunks=(4096, 8192), budget_s=0.01)
    found = grid.fitting(bench, said.append)
    assert (found.rows, found.chunks, found.lengths) == ((64, 2048), (4096,), (16,)), "the smallest remains"
    assert said == ["float32: not measured for want of memory: 2,049, 8,192 rows"]
    assert dataclasses.replace(grid, rows=(64, 128), chunks=(2048,)).fitting(bench, said.append).rows == (64, 128)
    assert len(said) == 1


@pytest.mark.parametrize(("length", "tokens"), [(256, 4096), (32, 1000), (128, 64), (16, 16)])
def test_lengths_that_are_alike_and_not_equal(length, tokens):
    lengths = alike(length, tokens)
    assert lengths.sum() == tokens
    assert len(lengths) == max(1, round(tokens / length))
    if len(lengths) > 1:
        assert 0.75 * length < lengths.min() < length < lengths.max() < 1.25 * length
    assert layer_batch(tokens).num_tokens == tokens


def test_attention_is_measured_in_the_chunks_of_a_sweep(monkeypatch):
    spec, _ = open_model(DEMO, "dummy")
    bench = LayerBench(spec, CPU, torch.float32, 0.01)
    calls: list[int] = []
    monkeypatch.setattr(operations, "attend", lambda decoder, q, k, v, chunk: calls.append(len(q)))
    monkeypatch.setattr(bench, "_seconds", lambda work: work() or 1.0)
    assert bench.attention(96, 256, 128) > 0
    assert calls == [128, 128]
    calls.clear()
    bench.attention(300, 256, 128)
    assert (len(calls), sum(calls)) == (3, 300), "at least one sequence"


def test_a_model_without_experts_is_refused():
    with pytest.raises(UsageError, match="no layer with experts"):
        one_layer(model_spec(((False, None),)))


def test_the_command_writes_a_profile_and_prints_rates_and_t(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Grid, "of", lambda device: SMALL)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "profile.json"
    assert main(["calibrate", "--model", str(DEMO), "--dtype", "float32", "--threads", "1", "-o", str(path)]) == 0
    said = capsys.readouterr().out
    for expected in ("product float32", "expert product", "attention", "elementwise", "host", "t_paper", str(path)):
        assert expected in said
    assert "attention  plain torch: chosen; flash kernels need a GPU" in said
    assert "nothing streams" in said
    assert "offloaded, 2 buffers" in said
    assert load_profile(path, gpu="cpu").model == str(DEMO)
    assert json.loads(path.read_text())["command"].startswith("moe-prefill")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere/nothing-7B"], "nothing-7B"),
        (["--model", str(DEMO), "--dtype", "int4"], "dtype is 'int4'"),
        (["--model", str(DEMO), "--device", "abacus"], "device 'abacus' is not known"),
    ],
)
def test_what_the_command_refuses(options, message, capsys):
    assert main(["calibrate", *options]) > 0
    assert message in capsys.readouterr().err


def test_the_choice_of_an_attention_kernel_is_explained(monkeypatch):
    def kernel(name, refusal):
        return flash.FlashKernel(name, None, lambda device, windowed: refusal(windowed))

    fast = kernel("fast", lambda windowed: "its build has no sliding windows" if windowed else None)
    monkeypatch.setattr(flash, "KERNELS", (fast, kernel("slow", lambda windowed: None)))
    monkeypatch.setattr(kernels, "is_legal", lambda q: True)
    monkeypatch.setattr(flash, "chosen", flash.chosen.__wrapped__)  # its cache would outlive these kernels
    spec = model_spec(((True, None), (True, 128)))
    assert kernels.attention_kernels(spec, torch.device("cpu"), torch.bfloat16) == [
        "fast: chosen",
        "slow: possible",
        "fast: its build has no sliding windows (sliding windows)",
        "slow: chosen (sliding windows)",
    ]


@pytest.mark.gpu
def test_a_gpu_is_measured():
    spec, _ = open_model("Qwen3-30B-A3B", "dummy", 4)
    grid = Grid(rows=(1024, 8192), lengths=(512, 4096), chunks=(8192, 16384), budget_s=0.1)
    device = torch.device("cuda", 0)
    found = calibrate(spec, device, torch.bfloat16, model="30B", command="test", float8=True, grid=grid)
    for curves in (found.gemm, found.grouped, found.attention):
        assert 0 < curves["bfloat16"].best < found.peak("bfloat16")
    assert found.grouped["float8"].best < found.peak("float8")
    assert {"host", "local"} <= set(found.transfers)
    assert found.gpu == torch.cuda.get_device_name()
