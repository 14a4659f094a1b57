import json
import os
import sys
import time

import pytest

from moe_prefill.bench import CATEGORIES, Job, compared, figure, run_ours, run_side, save_report
from moe_prefill.bench.job import long_enough, raw_config
from moe_prefill.bench.ours import timed_sweeps
from moe_prefill.bench.peers import run_until_found
from moe_prefill.cli import main
from moe_prefill.config import EngineConfig
from moe_prefill.errors import OutputError, UsageError, WorkerError
from tests.checkpoint.float8_models import save
from tests.workers.helpers import is_alive, wait_for

HEAD = {"gpu": "cpu", "date": "2026-01-01", "command": "x", "git": "0", "torch": "2"}


def job_of(model, cells=("32", "4x8@128"), **settings):
    common = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "threads": 1, "prune_last": False}
    config = EngineConfig(model=model, max_sweep_tokens=512, **common | settings)
    return Job(name="tiny", config=config, cells=cells, seconds=0.0)


def test_cells_have_the_keys_of_result_files(tiny_model):
    told = []
    plain, sharing = run_ours(job_of(tiny_model), told.append)
    assert told == [plain, sharing]
    assert plain["sweep_tokens"] == 512
    assert plain["tokens"] == 32
    assert (plain["layers"], plain["precision"], plain["strategy"]) == (3, "fp32", "asyncep")
    assert plain["expert_load_max_over_mean"] >= 1.0
    assert plain["predicted_tokens_per_s"] > 0
    assert set(plain["breakdown"]["ms"]) == set(CATEGORIES)
    assert {operation for operation, _, _ in plain["breakdown"]["kernels"]} >= {"attention", "experts"}
    assert (sharing["siblings"], sharing["tail"], sharing["tokens"]) == (4, 8, 136)
    assert sharing["requests"] % 4 == 0


def test_a_model_published_in_float8_is_named_so(tmp_path):
    save(tmp_path / "blocks")
    for settings, precision in (({}, "fp8"), ({"dtype": "auto"}, "fp8")):
        assert job_of(str(tmp_path / "blocks"), ("32",), **settings).precision == precision
    wide = str(tmp_path / "blocks" / "reference")
    named = {dtype: job_of(wide, ("32",), dtype=dtype).precision for dtype in ("auto", "float32", "bfloat16")}
    assert named == {"auto": "fp32", "float32": "fp32", "bfloat16": "bf16"}
    (cell,) = run_ours(job_of(str(tmp_path / "blocks"), ("32",)))
    assert cell["precision"] == "fp8"


def test_a_cell_longer_than_the_sweep_is_refused(tiny_model):
    with pytest.raises(UsageError, match=r"1,024 tokens.*512"):
        run_ours(job_of(tiny_model, ("1024",)))


def test_a_presets_context_grows_to_the_longest_cell():
    job = Job(name="x", config=EngineConfig(model="Qwen3-30B-A3B", load_format="dummy"), cells=("256", "131072"))
    with long_enough(job) as longer:
        assert raw_config(longer.config)["max_position_embeddings"] == 131072
    short = Job(name="x", config=job.config, cells=("256",))
    with long_enough(short) as same:
        assert same is short


def test_transformers_gives_the_same_logits_on_the_same_weights(tiny_model):
    job = job_of(tiny_model)
    ours = [cell | {"breakdown": None} for cell in run_ours(job)]
    for cell in compared(ours, run_side("transformers", job)):
        assert cell["largest_relative_difference"] < 1e-4
        assert cell["ratio"] == pytest.approx(cell["tokens_per_s"] / cell["peer_tokens_per_s"])
        assert cell["peer"] == "transformers"
        assert "logits" not in cell


def test_a_side_that_fails_says_so(tiny_model):
    with pytest.raises(WorkerError, match="ours ended with code 2"):
        run_side("ours", job_of(tiny_model, ("4096",)))


def test_workers_are_measured_too(tiny_model):
    (cell,) = run_ours(job_of(tiny_model, ("32",), gpus=2))
    assert cell["sweep_tokens"] <= 512
    assert cell["tokens_per_s"] > 0


def test_a_report_keeps_other_cells_and_replaces_its_own(tmp_path):
    path = tmp_path / "new" / "r.json"
    cell = {"model": "m", "precision": "bf16", "tokens": 256, "tokens_per_s": 1.0, "logits": [[1.0]]}
    other = cell | {"tokens": 4096}
    save_report(path, HEAD, [cell, other])
    save_report(path, HEAD | {"date": "2026-01-02"}, [cell | {"tokens_per_s": 2.0}], append=True)
    found = json.loads(path.read_text())
    assert [(c["tokens"], c["tokens_per_s"]) for c in found["cells"]] == [(4096, 1.0), (256, 2.0)]
    assert found["cells"][0]["date"] == "2026-01-01"
    assert "logits" not in found["cells"][1]
    path.write_text("[]")
    with pytest.raises(OutputError, match="not a result file"):
        save_report(path, HEAD, [cell], append=True)


def test_a_picture_shows_every_cell_with_a_breakdown():
    parts = dict.fromkeys(CATEGORIES, 1.0)
    cell = {"model": "a<b", "precision": "bf16", "tokens": 256, "tokens_per_s": 9.0, "mfu": 0.5}
    drawn = figure([cell | {"breakdown": {"ms": parts}}, cell], "t & t")
    assert drawn.count("a&lt;b") == 1
    assert "t &amp; t" in drawn
    assert "50.0%" in drawn


def test_the_command_prints_and_saves(tiny_model, tmp_path, capsys):
    out, plot = tmp_path / "b.json", tmp_path / "b.svg"
    arguments = ["bench", tiny_model, "--load-format", "dummy", "--dtype", "float32", "--threads", "1", "--cells", "32"]
    arguments += ["--max-tokens", "256", "--seconds", "0", "--routing", "skew16", "--layers", "2"]
    assert main([*arguments, "-o", str(out), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "ms a layer" in shown
    (cell,) = json.loads(out.read_text())["cells"]
    assert (cell["layers"], cell["dummy_skew"]) == (2, 16.0)
    assert plot.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peer", "llama"], "peers: vllm, transformers"),
        (["--peer", "vllm", "--peer-site", "/nowhere"], "--peer-site"),
        (["--plot", "x.png"], "ends in .svg"),
        (["--routing", "even"], "balanced, skew16"),
        (["--cells", "4k"], "8x16@2048"),
    ],
)
def test_mistakes_are_told_before_work(tiny_model, capsys, flags, message):
    assert main(["bench", tiny_model, "--load-format", "dummy", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_side_that_hangs_behind_its_figures_is_ended_with_all_it_started(tmp_path):
    found = tmp_path / "cells.json"
    program = (
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); open({str(found)!r}, 'w').write('[]')\n"
        "time.sleep(1000)"
    )
    assert run_until_found([sys.executable, "-c", program], os.environ, found, grace_s=0.5) == 0
    child = int((tmp_path / "child").read_text())
    assert wait_for(lambda: not is_alive(child))
    assert run_until_found([sys.executable, "-c", "raise SystemExit(3)"], os.environ, tmp_path / "none") == 3


def test_the_last_sweep_whose_answers_come_at_once_is_not_timed(monkeypatch):
    """A device with a full queue: the answers of a sweep are read when the next one is in it, 10 s later."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class FullQueue:
        def compute(self, sweeps):
            waiting = 0
            for _ in sweeps:
                if waiting:
                    now[0] += 10
                    yield None
                waiting = 1
            yield None

    timing = timed_sweeps(FullQueue(), [], 0.0)
    assert timing.timed == [10.0, 10.0]
