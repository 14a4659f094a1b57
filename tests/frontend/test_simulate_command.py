"""``moe-prefill simulate``: policies in virtual time, from the command line."""

import json

import pytest

from moe_prefill.cli import main
from moe_prefill.workloads import make_workload, write_trace

MODEL = ["simulate", "-m", "Qwen3-30B-A3B", "--hbm-gib", "80", "--gpu", "H100"]


def run(capsys, *flags: str) -> dict:
    assert main([*MODEL, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_mix_and_all_policies(capsys):
    told = run(capsys, "--mix", "high", "--scale", "0.003", "--policies", "all", "--workers", "2", "--kv-gib", "1")
    assert told["kv_blocks"] == (1 << 30) // (2 * 48 * 4 * 128 * 2 * 16)
    by_policy = {each["policy"]: each for each in told["policies"]}
    assert len(by_policy) == 7
    assert all(each["tokens_per_s"] > 0 and each["refused"] == 0 for each in by_policy.values())
    assert by_policy["ours"]["saved_fraction"] >= by_policy["round-robin"]["saved_fraction"] > 0


def test_a_trace_in_time(capsys, tmp_path):
    workload = make_workload("bursts", scale=0.001, interval_s=5.0).fitted(4096, 1000)
    write_trace(workload, tmp_path / "trace.jsonl")
    told = run(capsys, "--trace", str(tmp_path / "trace.jsonl"), "--workers", "1", "--max-wait-ms", "20")
    assert (told["workload"], told["requests"]) == ("trace", len(workload.requests))
    assert told["policies"][0]["makespan_s"] > 30, "the last burst comes then"
    assert told["profile"] == {"gpu": "H100", "estimated": True}


def test_a_table_for_people(capsys):
    assert main([*MODEL, "--mix", "low", "--scale", "0.0005"]) == 0
    shown = capsys.readouterr().out
    assert "8 x H100 (estimated)" in shown
    assert "round-robin" in shown


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--policies", "ours,best"], 2, "best is unknown"),
        (["--mix", "lunch"], 2, "there is no workload 'lunch'"),
        (["--scale", "0.001", "--max-positions", "2048"], 2, "give --max-positions"),
        (["--trace", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["--trace", "empty.jsonl"], 3, "no requests"),
    ],
)
def test_mistakes_are_said(capsys, tmp_path, monkeypatch, flags, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert main([*MODEL, *flags]) == code
    assert said in " ".join(capsys.readouterr().err.split())
