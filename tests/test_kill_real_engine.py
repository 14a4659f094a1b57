"""SIGKILL at random moments of real jobs (loading included), then --resume: the output is that of an uninterrupted run.

``tests/jobs/test_kill.py`` does it over an engine without weights, at every step of a window. Here the bundled model
computes, so that the engine's own numbers must come out the same, to the last bit, in another process.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_prefill.cli import main
from moe_prefill.jobs import sidecar_path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/demo_model/checkpoint"
ROWS, WINDOW_ROWS = 24, 3
KILLS = 12 if os.environ.get("MOE_PREFILL_LONG") else 2
CLASSIFY = ["classify", "--task", str(ROOT / "examples/demo_model/spam.toml")]
SELECT = [
    "select",
    "--candidates",
    "money,meeting,software",
    "--template",
    "{text}\n\nAbout {candidate}?",
]


@dataclass(frozen=True)
class Job:
    """One command and its output. Each run is a process of its own, forked from one that has only imported torch."""

    context: multiprocessing.context.ForkServerContext
    source: Path
    output: Path
    task: list[str]

    @property
    def parts(self) -> Path:
        return self.output.with_name(self.output.name + ".parts")

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    def start(self) -> BaseProcess:
        kind, *flags = self.task
        command = [kind, str(self.source), *flags, "--model", str(MODEL), "--threads", "1", "--json", "--resume"]
        command += ["--window-rows", str(WINDOW_ROWS), "--label-column", "label", "-o", str(self.output)]
        process = self.context.Process(target=run_command, args=(command, self.log))
        process.start()
        return process

    def finish(self) -> dict[str, Any]:
        """Run to the end; returns the summary."""
        process = self.start()
        process.join()
        assert process.exitcode == 0, self.log.read_text()
        summary: dict[str, Any] = json.loads(self.log.read_text().splitlines()[-1])
        return summary

    def kill(self, parts: int, delay_s: float) -> bool:
        """Start, wait for that many parts and then ``delay_s``, and kill; True if the job was still running."""
        process = self.start()
        while process.is_alive() and not (self.parts.exists() and self.num_parts() >= parts):
            time.sleep(0.001)
        time.sleep(delay_s)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), self.log.read_text()
        return process.exitcode != 0

    def num_parts(self) -> int:
        return len(list(self.parts.glob("part-*")))


def run_command(command: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(command))


@pytest.fixture(scope="module")
def context() -> Iterator[multiprocessing.context.ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_prefill.engine", "moe_prefill.cli", "moe_prefill.text", "pyarrow.parquet"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


@pytest.fixture(scope="module")
def mails() -> list[dict[str, str | None]]:
    """Real mails, and among them a null, a blank and an over-long text."""
    with (ROOT / "examples/data/mails.csv").open(newline="", encoding="utf-8") as lines:
        rows: list[dict[str, str | None]] = [{**row, "text": row["text"][:300]} for row in csv.DictReader(lines)][:ROWS]
    rows[4]["text"], rows[10]["text"], rows[20]["text"] = None, " \n", "far too long " * 3000
    return rows


def write_rows(path: Path, rows: list[dict[str, str | None]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=WINDOW_ROWS)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def kill_often(job: Job, chance: random.Random) -> list[int]:
    """Kill while the model loads, then after new parts, again and again. The parts that each kill found."""
    assert job.kill(0, chance.uniform(0, 0.1))
    found = []
    for _ in range(KILLS):
        if not job.kill(job.num_parts() + chance.randint(1, 2), chance.uniform(0, 0.1)):
            break
        found.append(job.num_parts())
    return found


@pytest.mark.parametrize(
    ("kind", "task"), [("csv", CLASSIFY), ("jsonl", CLASSIFY), ("parquet", CLASSIFY), ("jsonl", SELECT)]
)
def test_killed_job_resumes_to_the_same_output(
    tmp_path: Path,
    context: multiprocessing.context.ForkServerContext,
    mails: list[dict[str, str | None]],
    kind: str,
    task: list[str],
) -> None:
    source = write_rows(tmp_path / f"in.{kind}", mails)
    whole, job = (Job(context, source, tmp_path / f"{name}.{kind}", task) for name in ("whole", "out"))
    summary = whole.finish()
    assert summary["errors"] == {"empty_text": 2, "too_long": 1}
    assert (summary["saved_prefix_tokens"] > 0.5) == (task is SELECT)  # siblings share the mail

    found = kill_often(job, random.Random(f"{kind} {task[0]}"))
    assert any(0 < parts < ROWS // WINDOW_ROWS for parts in found)
    job.finish()

    if kind == "parquet":
        assert pq.read_table(job.output).equals(pq.read_table(whole.output), check_metadata=True)
    else:
        assert job.output.read_bytes() == whole.output.read_bytes()
    assert not job.parts.exists()
    counts = [json.loads(sidecar_path(one.output).read_text())["counts"] for one in (job, whole)]
    assert counts[0] == counts[1]
