"""SIGKILL at random moments, then --resume: the output is that of an uninterrupted run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import rows, run, write_table

from moe_prefill.jobs import sidecar_path

DRIVER = Path(__file__).with_name("kill_driver.py")
WINDOWS = 12


def start(source: Path, output: Path, *flags: str) -> subprocess.Popen[bytes]:
    """A job whose windows take 20 ms each."""
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(source), str(output), "0.02", *flags], stderr=subprocess.PIPE
    )


def kill_within(process: subprocess.Popen[bytes], parts: Path, seconds: float) -> bool:
    """Kill at ``seconds`` after the first sign of work; True if the job was still running."""
    while process.poll() is None and not (parts / "manifest.json").exists():
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_killed_job_resumes_to_the_same_output(tmp_path: Path, kind: str) -> None:
    source = write_table(tmp_path / f"in.{kind}", rows(7 * WINDOWS))
    whole, output = tmp_path / f"whole.{kind}", tmp_path / f"out.{kind}"
    run(source, whole, label_column="gold")
    chance = random.Random(kind)
    kills = 0
    for _ in range(4):
        kills += kill_within(
            start(source, output, "--resume"), output.with_name(output.name + ".parts"), chance.uniform(0, 0.25)
        )
    last = start(source, output, "--resume")
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert kills >= 2
    if kind == "parquet":
        assert pq.read_table(output).equals(pq.read_table(whole), check_metadata=True)
        assert pq.ParquetFile(output).num_row_groups == WINDOWS
    else:
        assert output.read_bytes() == whole.read_bytes()
    assert not output.with_name(output.name + ".parts").exists()
    totals = [json.loads(sidecar_path(path).read_text())["counts"] for path in (output, whole)]
    assert totals[0] == totals[1]


def test_killed_at_every_step_of_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before each flush and rename in turn, and resume."""
    import os

    source = write_table(tmp_path / "in.csv", rows(20))
    run(source, tmp_path / "whole.csv")
    output = tmp_path / "out.csv"

    class Stopped(BaseException):
        pass

    real_fsync, real_replace = os.fsync, Path.replace
    stops = 0
    for step in range(1000):
        left = [step]

        def tick(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

        monkeypatch.setattr(os, "fsync", lambda fd, tick=tick: (tick(), real_fsync(fd))[1])
        monkeypatch.setattr(Path, "replace", lambda path, to, tick=tick: (tick(), real_replace(path, to))[1])
        try:
            run(source, output)
            break
        except Stopped:
            stops += 1
            monkeypatch.undo()
            run(source, output, resume=True)
            assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
            assert not output.with_name("out.csv.parts").exists()
            output.unlink()
            sidecar_path(output).unlink()
    assert stops > 15
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
