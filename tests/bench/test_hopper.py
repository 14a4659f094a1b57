"""The benchmark of one GPU runs as written, on a CPU with a tiny model: it predicts from what it measures first."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from moe_prefill.bench import Job
from moe_prefill.config import EngineConfig
from moe_prefill.machine import estimated_profile, save_profile

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/hopper.py"


def test_predictions_come_from_a_profile_of_the_same_run(tiny_model, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("hopper", SCRIPT)
    hopper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hopper)
    config = EngineConfig(
        model=tiny_model, load_format="dummy", device="cpu", dtype="float32", max_sweep_tokens=256, threads=1
    )
    monkeypatch.setattr(hopper, "PARTS", {"tiny": Job(name="tiny", config=config, cells=("16",))})
    asked = []

    run = subprocess.run

    def calibrate(command, **rest):  # what moe-prefill calibrate does has tests of its own
        if "calibrate" not in command:
            return run(command, **rest)
        asked.append(command[3:-1])
        profile = replace(estimated_profile("cpu"), is_estimated=False, model="tiny", date="2026-01-01")
        save_profile(profile, command[-1])
        return None

    monkeypatch.setattr(hopper.subprocess, "run", calibrate)
    out = tmp_path / "hopper.json"
    monkeypatch.setattr(sys, "argv", ["hopper.py", "--parts", "tiny", "--out", str(out), "--seconds", "0"])
    hopper.main()
    (cell,) = json.loads(out.read_text())["cells"]
    assert asked == [["calibrate", "--model", tiny_model, "--dtype", "float32", "--output"]]
    assert (tmp_path / "profile_cpu_tiny_fp32.json").exists()
    assert cell["predicted_from"] == "profile of tiny, 2026-01-01"
    assert cell["predicted_tokens_per_s"] > 0
    assert "calibrated tiny fp32" in capsys.readouterr().out
