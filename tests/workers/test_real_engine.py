"""Several processes over the demo model: bit for bit the answers of one engine in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.distributed import HashStore

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.engine import build_engine
from moe_prefill.engine.build import rank_device
from moe_prefill.errors import PlanError, UsageError
from moe_prefill.experts import Ranks
from moe_prefill.workers import GroupEngine
from tests.workers.helpers import harm_later, wait_for, workers

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples/demo_model"
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 24,
    "mlp_only_layers": [1],
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


def config_of(model: Path | str, **settings) -> EngineConfig:
    return EngineConfig(model=str(model), device="cpu", dtype="float32", threads=1, **settings)


def requests_of(seed: int, vocabulary: int, longest: int, count: int = 80) -> list[AtomicRequest]:
    """Candidates, continuations with top-k, and shared prefixes."""
    r = np.random.default_rng(seed)
    prefix = r.integers(0, vocabulary, longest // 2)
    made = []
    for index in range(count):
        tokens = r.integers(0, vocabulary, r.integers(2, longest // 2))
        if index % 3 == 0:
            tokens = np.concatenate([prefix[: r.integers(1, len(prefix))], tokens])
        if index % 4 == 0:
            made.append(AtomicRequest.continuation(tokens, 1, top_k=index % 5))
        else:
            made.append(AtomicRequest.candidates(tokens, r.integers(0, vocabulary, 3), salt="ab"[index % 2]))
    return made


def save_tiny(directory: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**TINY)).save_pretrained(directory)


def equal(a, b) -> bool:
    names = ("logits", "log_z", "top_ids", "top_logprobs")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in pairs)


def check_equal(config: EngineConfig, sizes: dict[int, bool], requests: list[AtomicRequest]) -> None:
    """``sizes``: whether to kill a worker in the middle, for each number of processes."""
    alone = build_engine(config)
    expected = alone.score(requests)
    for size, kill in sizes.items():
        engine = GroupEngine(
            EngineConfig(**{name: getattr(config, name) for name in config.__slots__} | {"gpus": size})
        )
        assert engine.plan_digest == alone.plan_digest
        assert engine.limits == alone.limits
        if kill:
            harm_later(engine, -1, sweeps=0)
        results = engine.score(requests)
        assert all(equal(a, b) for a, b in zip(expected, results, strict=True))
        stats = engine.stats
        assert (stats.sweeps, stats.requests, stats.flops, stats.computed_tokens) == (
            alone.stats.sweeps,
            len(requests),
            alone.stats.flops,
            alone.stats.computed_tokens,
        )
        engine.close()
        assert (stats.restarts > 0) == kill
        assert workers() == []


def test_two_workers_one_of_them_killed_equal_one_engine():
    check_equal(config_of(DEMO / "checkpoint", max_sweep_tokens=128), {2: True}, requests_of(0, 8000, 120, 120))


def test_three_workers_equal_one_engine_under_dynamic_rope(tmp_path):
    save_tiny(tmp_path)
    check_equal(config_of(tmp_path, max_sweep_tokens=300, sharing="force"), {3: False}, requests_of(1, 97, 280))


def test_ranks_that_stage_shards_for_one_another_survive_a_loss(tmp_path):
    """Hybrid residency: every rank waits for its peers in every layer, and all go in rounds."""
    save_tiny(tmp_path)
    requests = requests_of(2, 97, 280, 200)
    expected = build_engine(config_of(tmp_path, max_sweep_tokens=300)).score(requests)
    engine = GroupEngine(config_of(tmp_path, max_sweep_tokens=300, residency="hybrid", gpus=2))
    assert engine.plan.schedule == "rounds"
    harm_later(engine, 1, sweeps=4)
    assert all(equal(a, b) for a, b in zip(expected, engine.score(requests), strict=True))
    assert engine.stats.restarts == 1
    engine.close()


def test_what_the_workers_refuse_is_refused_here():
    with pytest.raises(PlanError, match="MiB of device memory"):
        GroupEngine(config_of(DEMO / "checkpoint", gpus=2, host_gib=0.001))
    assert workers() == []


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [rank_device("auto", Ranks(rank, 2, HashStore())).index for rank in range(2)] == [0, 1]
    assert rank_device("cuda:1", Ranks(0, 2, HashStore())).index == 1  # two ranks on one GPU, when asked
    with pytest.raises(UsageError, match=r"3 GPUs were asked for, and this machine has 2; give --gpus 2"):
        rank_device("cuda", Ranks(0, 3, HashStore()))


def test_layers_are_counted_and_empty_sweeps_move_banks_only(tmp_path):
    save_tiny(tmp_path)
    done = np.zeros(1, np.int64)
    engine = build_engine(config_of(tmp_path), layers_done=done)
    requests = requests_of(3, 97, 60, 9)
    first, empty = engine.compute([requests, []])
    assert (len(first), empty) == (len(requests), [])
    assert done.tolist() == [2 * 3]
    assert engine.stats.sweeps == 1
    engine.close()


@pytest.mark.parametrize("resume_with", [1, 2] if os.environ.get("MOE_PREFILL_LONG") else [1])
def test_a_job_of_two_processes_killed_and_resumed_writes_the_file_of_one(tmp_path, resume_with):
    def job(output: Path, gpus: int, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "moe_prefill.cli", "classify", str(ROOT / "examples/data/mails.csv")]
        command += ["--task", str(DEMO / "spam.toml"), "--model", str(DEMO / "checkpoint"), "--device", "cpu"]
        command += ["--threads", "1", "--max-sweep-tokens", "2048", "--limit", "30", "--window-rows", "3", "--quiet"]
        return subprocess.Popen([*command, "--gpus", str(gpus), "-o", str(output), *flags], env=os.environ)

    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert job(one, 1).wait() == 0
    first = job(two, 2)
    parts = tmp_path / "two.csv.parts"
    assert wait_for(lambda: len(list(parts.glob("*"))) > 4 or first.poll() is not None, 60)
    assert first.poll() is None, "the job was over before it could be killed"
    first.kill()
    first.wait()
    assert job(two, resume_with, "--resume").wait() == 0
    assert two.read_bytes() == one.read_bytes()
