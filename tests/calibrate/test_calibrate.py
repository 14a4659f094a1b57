"""Calibration on the CPU with the demo model: what it writes, what it prints, and that it agrees with itself."""

import json
from pathlib import Path

import pytest
import torch

from moe_prefill import ops
from moe_prefill.calibrate import Grid, calibrate, kernels, operations
from moe_prefill.calibrate.operations import LayerBench, alike, layer_batch, one_layer
from moe_prefill.cli import main
from moe_prefill.costmodel import layer_seconds, predict_sweep
from moe_prefill.engine.load import open_model
from moe_prefill.errors import UsageError
from moe_prefill.machine import load_profile
from moe_prefill.ops import flash
from moe_prefill.residency import bank_bytes
from tests.costmodel.models import model_spec

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
    assert found.elementwise["float32"].best <= found.memory_bandwidth
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
