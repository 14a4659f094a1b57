"""``moe-prefill plan --strategy``: what a rank of each baseline holds, by hand, and what their shapes do not allow."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_prefill.cli import main
from moe_prefill.memory import GIB

STRATEGIES = ("dp+ep", "dp+tp", "tp+ep", "tp+tp", "pp+pp")

# Qwen3-30B-A3B in bfloat16: D 2048, 32 query and 4 KV heads of 128, 128 experts of 768, 48 layers, 151,936 tokens.
ENDS = 2 * 2 * 151_936 * 2048
EXPERT = 2 * 3 * 768 * 2048
NORMS = 2 * (2 * 2048 + 2 * 128)
ROUTER = 2 * 128 * 2048
HEAD = 2 * 128 * 2048  # rows of one head in qkv, or its columns in the output matrix


def planned(capsys: pytest.CaptureFixture[str], strategy: str, gpus: int, *arguments: str) -> dict[str, Any]:
    model = ["--model", "Qwen3-30B-A3B", "--hbm-gib", "79"]
    assert main(["plan", *model, "--strategy", strategy, "--gpus", str(gpus), "--json", *arguments]) == 0
    fields: dict[str, Any] = json.loads(capsys.readouterr().out)
    return fields


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_of_a_rank_by_hand(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, strategy, 8)["device_bytes"]
    layers = 6 if strategy == "pp+pp" else 48
    q_heads, kv_heads = (4, 1) if strategy.startswith("tp") else (32, 4)  # eight ranks hold each KV head twice
    attention = (2 * q_heads + 2 * kv_heads) * HEAD
    assert found["attention, routers, dense"] == layers * (attention + NORMS + ROUTER) + 2 * 2048
    assert found["embedding and head"] == ENDS
    assert found["experts"] == 48 * 128 * EXPERT // 8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_plan_keeps_to_its_memory_and_more_ranks_take_more_tokens(
    strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    two, eight = planned(capsys, strategy, 2), planned(capsys, strategy, 8)
    for found in (two, eight):
        assert found["peak_device_bytes"] == sum(found["device_bytes"].values()) <= 79 * GIB
        assert found["sweep_tokens"] <= found["largest_sweep_tokens"]
        assert found["sweep_is_of"] == ("rank" if strategy.startswith("dp") else "group")
    assert two["largest_sweep_tokens"] < eight["largest_sweep_tokens"]


def test_dispatch_is_less_on_average_than_at_worst(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "dp+ep", 8)
    assert 1 < found["mean_ranks_a_row"] < 8
    assert found["mean_sent_and_received_bytes"] < found["device_bytes"]["sent and received"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sweep_is_predicted(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, strategy, 4)
    assert found["profile"] == {"gpu": "H200", "estimated": True}
    assert found["sweep_s"] == found["compute_s"] + found["transfer_s"]
    tokens = found["sweep_tokens"] * (4 if strategy.startswith("dp") else 1)
    assert found["tokens_per_s"] == pytest.approx(tokens / found["sweep_s"])
    assert (found["transfer_s"] > 0) == (strategy != "pp+pp")
    assert (found["fill_s"] > 0) == (strategy == "pp+pp")
    assert main(["plan", "--model", "Qwen3-30B-A3B", "--hbm-gib", "79", "--strategy", strategy, "--gpus", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"{found['tokens_per_s']:,.0f} tokens/s of all GPUs" in shown
    assert "estimated from its datasheet, not measured" in shown


def test_a_card_without_float8_units_is_planned_but_not_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "dp+ep", 4, "--gpu", "A100", "--quantization", "fp8")
    assert found["peak_device_bytes"] <= 79 * GIB
    assert "no float8 rate" in found["unpredicted"]


def test_a_wanted_sweep_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "tp+tp", 4, "--max-sweep-tokens", "1000", "--chunk-rows", "500")
    assert (found["sweep_tokens"], found["chunk_rows"]) == (1000, 500)


def test_people_see_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "Qwen3-235B-A22B", "--quantization", "fp8", "--gpus", "8", "--hbm-gib", "79"]
    assert main(["plan", *arguments, "--strategy", "dp+ep"]) == 0
    said = capsys.readouterr().out
    assert "of rank 0, which holds most" in said
    assert "ranks a row" in said
    assert "tokens of each GPU's own requests" in said


@pytest.mark.parametrize(
    ("strategy", "gpus", "code", "complaint"),
    [
        ("tp+ep", 3, 2, "attention heads over 3 ranks, and 32 is not a multiple of 3"),
        ("dp+tp", 7, 2, "channels of an expert over 7 ranks, and 768 is not a multiple"),
        ("dp+ep", 200, 2, "the model has 128"),
        ("pp+pp", 49, 2, "the model has 48"),
        ("ep+dp", 2, 2, "'ep+dp' is not one of"),
    ],
)
def test_shapes_that_a_strategy_does_not_allow(
    strategy: str, gpus: int, code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "Qwen3-30B-A3B", "--hbm-gib", "79"]
    assert main(["plan", *model, "--strategy", strategy, "--gpus", str(gpus)]) == code
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_the_large_model_fits_on_fewer_gpus_under_asyncep() -> None:
    def code(strategy: str, gpus: int) -> int:
        model = ["--model", "Qwen3-235B-A22B", "--quantization", "fp8", "--hbm-gib", "79"]
        return main(["plan", *model, "--strategy", strategy, "--gpus", str(gpus), "--json"])

    assert [code("asyncep", gpus) for gpus in (1, 2)] == [0, 0]
    assert {(code(strategy, 2), code(strategy, 4)) for strategy in STRATEGIES} == {(6, 0)}


def test_what_does_not_fit_says_so_with_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "Qwen3-235B-A22B", "--hbm-gib", "79", "--strategy", "dp+ep", "--gpus", "2"]) == 6
    said = capsys.readouterr().err
    assert "experts: 211.50 GiB" in said
    assert "no sweep fits" in said
