"""The benchmark of the strategies runs as written: on CPU processes, with a small model."""

import json
import subprocess
import sys
from pathlib import Path

from tests.reference import random_config

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_strategies_beside_asyncep(tmp_path):
    config = random_config("mixtral", 0)
    config.num_hidden_layers, config.max_position_embeddings = 2, 512
    config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/two_gpu.py", "--device", "cpu", "--dtype", "float32", "--out", str(out)]
    command += ["--model", str(tmp_path / "model"), "--strategies", "dp+ep,pp+pp,asyncep", "--tokens", "20"]
    command += ["--sweeps", "100,200", "--chunks", "64", "--micro-batches", "2", "--run-tokens", "200"]
    command += ["--seconds", "0", "--least-runs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    cells = {cell["strategy"]: cell for cell in report["cells"]}
    assert set(cells) == {"dp+ep", "pp+pp", "asyncep"}
    for cell in cells.values():
        assert cell["requests"] == (80 if cell["strategy"] == "pp+pp" else 40)
        assert cell["sweep_tokens"] in (100, 200)
        assert 1 <= cell["expert_load_max_over_mean"] <= config.num_local_experts
    for strategy in ("dp+ep", "pp+pp"):
        want = cells["asyncep"]["tokens_per_s"] / cells[strategy]["tokens_per_s"]
        assert abs(cells[strategy]["ratio"] - want) < 1e-9
    assert all(len(entry["seconds"]) == 2 and not entry["refused"] for entry in report["searched"])
