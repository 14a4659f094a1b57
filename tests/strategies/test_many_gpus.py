"""The benchmarks of several GPUs run as written: on CPU processes, with a small model; predictions without any."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import random_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = random_config("mixtral", 0)
    config.num_hidden_layers, config.max_position_embeddings = 3, 512
    config.num_attention_heads, config.num_key_value_heads = 6, 3  # which 4 ranks cannot split
    directory = tmp_path_factory.mktemp("model")
    config.save_pretrained(directory)
    return directory


def run(script: str, out: Path, *arguments: str) -> dict:
    command = [sys.executable, f"benchmarks/{script}.py", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()) if out.exists() else {}


def small(model: Path, parts: str, *more: str) -> list[str]:
    words = f"--device cpu --dtype float32 --model {model} --parts {parts} --tokens 20 --sweeps 100,200 --chunks 64"
    words += " --micro-batches 2 --run-tokens 200 --least-runs 2 --warm-up 1 --pulls-a-run 2 --scale 0.001"
    return [*words.split(), "--hbm-gib", "4", "--host-gib", "4", *more]


def test_two_processes(model, tmp_path):
    out = tmp_path / "out.json"
    arguments = small(model, "strategies,scaling,pulls", "--skews", "1", "--strategies", "asyncep,dp+ep,pp+pp")
    report = run("two_gpu", out, *arguments, "--residencies", "sharded")
    cells = {cell["strategy"]: cell for cell in report["cells"] if cell["part"] == "strategies"}
    assert set(cells) == {"asyncep", "dp+ep", "pp+pp"}
    for cell in cells.values():
        assert (cell["gpus"], cell["engine"], cell["dummy_skew"], cell["layers"]) == (2, "moe-prefill", 1.0, 3)
        assert cell["requests"] == (80 if cell["strategy"] == "pp+pp" else 40)
        assert cell["sweep_tokens"] in (100, 200)
        assert len(cell["searched_s"]) == 2
        assert cell["measured_over_predicted"] == cell["tokens_per_s"] / cell["predicted_tokens_per_s"]
        assert 1 <= cell["expert_load_max_over_mean"] <= 12
    for strategy in ("dp+ep", "pp+pp"):
        want = cells["asyncep"]["tokens_per_s"] / cells[strategy]["tokens_per_s"]
        assert cells[strategy]["ratio"] == pytest.approx(want)
    scaling = {(cell["residency"], cell["gpus"]): cell for cell in report["cells"] if cell["part"] == "scaling"}
    many, one = scaling.pop(("sharded", 2)), scaling.pop(("resident", 1))
    assert not scaling, "all layers are resident on one"
    assert many["over_one_gpu_resident"] == many["tokens_per_s"] / one["tokens_per_s"]
    pulls = [cell for cell in report["cells"] if cell["part"] == "pulls"]
    assert {(cell["pullers"], cell["sliced"], cell["staggered"]) for cell in pulls} == {
        ("one", True, True),
        *(("all", sliced, staggered) for sliced in (False, True) for staggered in (False, True)),
    }
    assert all(cell["gb_per_s"] > 0 for cell in pulls)
    predicted = json.loads((tmp_path / "out_predicted.json").read_text())
    assert predicted["note"] == "predictions of the cost model, none of them measured"
    assert len(predicted["predictions"]) == 3 + 2 + 5
    assert not any("tokens_per_s" in cell for cell in predicted["predictions"])
    assert out.with_suffix(".svg").read_text().count("<rect") == 1 + 3


def test_four_processes_with_experts_of_uneven_load(model, tmp_path):
    out = tmp_path / "out.json"
    strategies = small(model, "strategies", "--skews", "3", "--strategies", "asyncep,tp+ep")
    strategies += ["--search", "1", "--least-runs", "1"]
    report = run("eight_gpus", out, *strategies, "--gpus", "4", "--quantization", "fp8")
    cells = {cell["residency"]: cell for cell in report["cells"]}
    assert {residency: cell["levels"] for residency, cell in cells.items()} == {
        "sharded": "3 sharded",
        "hybrid": "3 hybrid",
    }
    assert {(cell["precision"], cell["gpus"], cell["dummy_skew"]) for cell in cells.values()} == {("fp8", 4, 3.0)}
    (why,) = report["refused"]
    assert why.startswith("strategies, 4 GPUs, tp+ep, skew 3: strategy tp+ep splits attention heads")


def test_the_aggregated_workload_in_tiers(model, tmp_path):
    """Added to the file of an earlier call."""
    out = tmp_path / "out.json"
    head = {"gpu": "cpu", "date": "2026-01-01", "git": "0", "torch": "2", "command": "x"}
    kept = {"part": "strategies", "strategy": "dp+ep", "gpus": 8, "tokens": 256, "dummy_skew": 1.0, "tokens_per_s": 1.0}
    kept |= {"model": "m", "precision": "fp8", "command": "x", "ratio": 1.5}
    out.write_text(json.dumps({**head, "cells": [kept]}))
    report = run("two_gpu", out, *small(model, "aggregated", "--least-runs", "1"))
    first, *cells = report["cells"]
    assert (first["gpus"], first["git"], first["command"], first["ratio"]) == (8, "0", "x", 1.5)
    tiers = [(cell["strategy"], cell.get("policy"), cell.get("frontend")) for cell in cells]
    assert tiers == [
        ("dp+ep", None, None),
        ("asyncep", "vllm", "off"),
        ("asyncep", "ours", "on"),
        ("dp+ep", "vllm", "off"),
        ("dp+ep", "shortest-prefill", None),
        ("pp+pp", "shortest-prefill", None),
    ]
    ours = cells[2]["tokens_per_s"]
    for cell in cells:
        assert (cell["tokens"], cell["gpus"]) == ("aggregated", 2)
        assert cell["predicted_tokens_per_s"] > 0
        if cell["strategy"] != "asyncep":  # which sweeps these compute does not depend on time
            assert cell["saved_fraction"] == pytest.approx(cell["predicted_saved_fraction"])
            assert cell["ratio"] == ours / cell["tokens_per_s"]
    assert all(0 < cell["saved_fraction"] < 1 for cell in cells[:-1])


PEER = """
import json, pathlib, time, types
__version__ = "0.1"
SamplingParams = dict
class LLM:
    def __init__(self, **arguments):
        if arguments.get("pipeline_parallel_size", 1) > 1:
            raise ValueError("no pipeline here")
        with pathlib.Path(__file__).with_name("asked").open("a") as file:
            file.write(json.dumps(arguments) + "\\n")
        self.pause_s = 0.02 if arguments.get("enable_expert_parallel") else 0.04
        self.llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=lambda: None))
    def apply_model(self, function):
        assert function.__name__ == "refill"
    def generate(self, prompts, sampling, use_tqdm):
        time.sleep(self.pause_s)
        return prompts
"""


def test_a_peer_with_its_own_strategies(model, tmp_path):
    """A double of vLLM, which has no pipelines, is told how to use two GPUs; its best strategy is the one to beat."""
    out, site = tmp_path / "out.json", tmp_path / "site" / "vllm"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text(PEER)
    arguments = small(model, "strategies,vllm", "--skews", "1", "--strategies", "asyncep", "--residencies", "sharded")
    report = run("two_gpu", out, *arguments, "--peer-site", str(site.parent), "--vllm", '{"enforce_eager": true}')
    asked = {("enable_expert_parallel" in each): each for each in map(json.loads, (site / "asked").open())}
    assert all(each["tensor_parallel_size"] == 2 and each["enforce_eager"] for each in asked.values())
    assert asked[True]["enable_expert_parallel"]
    ours, *cells = report["cells"]
    assert [(cell["part"], cell["peer_strategy"]) for cell in cells] == [("vllm", "tp"), ("vllm", "ep")]
    for cell in cells:
        assert (cell["peer"], cell["peer_version"]) == ("vllm", "0.1")
        assert "tensor_parallel_size=2" in cell["peer_settings"]
        assert cell["tokens_per_s"] == ours["tokens_per_s"]
        assert cell["ratio"] == ours["tokens_per_s"] / cell["peer_tokens_per_s"]
        assert cell["peer_tokens_per_s"] < 2 * 200 * 2 / 0.02
    best = max(cells, key=lambda cell: cell["peer_tokens_per_s"])
    assert [cell["best_of_peer"] for cell in cells] == [cell is best for cell in cells]
    (why,) = report["refused"]
    assert why.startswith("vllm pp, 2 GPUs: the process of vllm ended with code 1")
    predicted = json.loads((tmp_path / "out_predicted.json").read_text())["predictions"]
    assert sum("predicted_peer_tokens_per_s" in cell for cell in predicted) == 3


def test_mixed_lengths_transports_and_a_smaller_card(model, tmp_path):
    out = tmp_path / "out.json"
    arguments = small(model, "strategies,transports,envelope", "--skews", "1", "--strategies", "asyncep,dp+ep,pp+pp")
    arguments += ["--tokens", "mixed", "--mixed", "10,40,90", "--envelope-gib", "1", "--threshold-length", "20"]
    report = run("two_gpu", out, *arguments, "--least-runs", "1", "--search", "1")
    mixed = {
        (cell["strategy"], cell.get("residency")): cell for cell in report["cells"] if cell["part"] == "strategies"
    }
    assert set(mixed) == {("asyncep", "sharded"), ("asyncep", "hybrid"), ("dp+ep", None), ("pp+pp", None)}
    for (strategy, _), cell in mixed.items():
        assert (cell["tokens"], cell["lengths"]) == ("mixed", [10, 40, 90])
        ranks = 4 if strategy == "pp+pp" else 2
        assert (cell["requests"], cell["run_tokens"]) == (8 * ranks, (6 * 10 + 40 + 90) * ranks)
        assert cell["measured_over_predicted"] == cell["tokens_per_s"] / cell["predicted_tokens_per_s"]
    moved = [(c["part"], c["transport"], c["sweep_tokens"]) for c in report["cells"] if c["part"] in MOVED]
    assert moved == [(part, by, tokens) for by in ("copy-engine", "nccl") for part, tokens in MOVED.items()]
    envelope = {(cell["gpus"], cell["hbm_gib"]): cell for cell in report["cells"] if cell["part"] == "envelope"}
    assert set(envelope) == {(2, 1.0), (2, 4.0), (1, 1.0), (1, 4.0)}
    for gpus in (1, 2):
        small_card, whole = envelope[gpus, 1.0], envelope[gpus, 4.0]
        assert small_card["over_uncapped"] == small_card["tokens_per_s"] / whole["tokens_per_s"]
        assert "over_uncapped" not in whole
    predicted = json.loads((tmp_path / "out_predicted.json").read_text())["predictions"]
    assert [cell["hbm_gib"] for cell in predicted if "predicted_over_uncapped" in cell] == [1.0, 1.0]


MOVED = {"transports": 200, "threshold": 20}  # tokens of a sweep


def test_predictions_need_no_gpu_and_keep_those_of_another_degree(tmp_path):
    out = tmp_path / "eight.json"
    for gpus in (4, 8):
        run(
            "eight_gpus",
            out,
            "--predict-only",
            "--parts",
            "strategies,scaling,pulls",
            "--gpus",
            str(gpus),
            "--tokens",
            "4096",
        )
    assert not out.exists()
    report = json.loads((tmp_path / "eight_predicted.json").read_text())
    cells = [cell for cell in report["predictions"] if cell["part"] == "strategies"]
    assert len(cells) == 2 * 2 * 7
    seconds = {command.split("--gpus ")[1][0]: s for command, s in report["predicted_call_s"].items()}
    assert seconds["8"] > seconds["4"] > 0
    ratios = {(c["gpus"], c["dummy_skew"], c["strategy"], c["tokens"]): c.get("predicted_ratio") for c in cells}
    assert ratios[8, 16.0, "dp+ep", 4096] > ratios[8, 1.0, "dp+ep", 4096] > ratios[4, 1.0, "dp+ep", 4096] > 1
    scaling = [c for c in report["predictions"] if c["part"] == "scaling"]
    assert {cell["gpus"] for cell in scaling} == {1, 4, 8}
    assert (tmp_path / "eight_predicted.svg").read_text().startswith("<svg")
