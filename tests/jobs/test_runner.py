"""A job over fakes: rows, windows, groups, metrics, resume, refusals."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import FakeEngine, FakeTask
from helpers import MODEL, open_for, rows, run, write_table

from moe_prefill.core import AtomicResult, EngineLimits, PreparedRow
from moe_prefill.errors import InputError, OutputError, UsageError
from moe_prefill.jobs import (
    FileOutput,
    JobConfig,
    LabelMetrics,
    Shard,
    StreamOutput,
    WindowSize,
    cut_windows,
    run_job,
    sidecar_path,
)
from moe_prefill.jobs.durable import check_space
from moe_prefill.jobs.spool import spool


def parts_of(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


class Interrupt(FakeEngine):
    """Stops at call number ``after``, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after

    def score(self, requests: Any) -> Any:
        if len(self.calls) == self._after:
            raise KeyboardInterrupt
        return super().score(requests)


def interrupt(source: Path, output: Path, after: int = 2, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, output, engine=Interrupt(after), **options)


class Starting(FakeEngine):
    """Begins with a list before another one is waited for; ``log`` says what happened. Stops at wait ``after``."""

    def __init__(self, after: int | None = None) -> None:
        super().__init__()
        self.log: list[str] = []
        self._after = after

    def start(self, requests: Any) -> Any:
        number = sum(entry.startswith("start") for entry in self.log)
        self.log.append(f"start {number}")

        def wait() -> Any:
            if number == self._after:
                raise KeyboardInterrupt
            self.log.append(f"wait {number}")
            return self.score(requests)

        return wait


def test_the_next_window_begins_before_one_is_waited_for(source: Path, tmp_path: Path) -> None:
    engine, whole, cut = Starting(), tmp_path / "whole.csv", tmp_path / "cut.csv"
    run(source, whole, engine=engine, window_rows=10)
    assert engine.log == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"]
    run(source, tmp_path / "plain.csv", window_rows=10)
    assert whole.read_bytes() == (tmp_path / "plain.csv").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(source, cut, engine=Starting(after=1), window_rows=10)
    resumed = Starting()
    run(source, cut, engine=resumed, window_rows=10, resume=True)
    assert len(resumed.log) == 4, "the window that was waited for is kept; of the one begun ahead nothing is"
    assert cut.read_bytes() == whole.read_bytes()


def test_a_window_is_one_call_and_errors_stay_in_their_rows(source: Path, tmp_path: Path) -> None:
    engine = FakeEngine()
    summary = run(source, tmp_path / "out.jsonl", engine=engine, window_rows=10)
    assert len(engine.calls) == 3
    assert summary.counts.errors == {"empty_text": 3, "too_long": 3}
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [bool(answer["error"]) for answer in answers] == [i % 9 in (3, 5) for i in range(30)]
    assert answers[5]["error"] == "too_long: 101 tokens, the limit is 64"
    assert all((answer["label"] is None) == bool(answer["error"]) for answer in answers)


def test_windows_and_groups_do_not_change_answers(source: Path, tmp_path: Path) -> None:
    outputs = []
    for rows_, sweep in ((1, 4096), (7, 4096), (None, 4096), (None, 1)):
        output = tmp_path / f"out-{rows_}-{sweep}.csv"
        run(source, output, window_rows=rows_, engine=FakeEngine(max_sweep=sweep))
        outputs.append(output.read_bytes())
    assert len(set(outputs)) == 1


def test_a_window_with_very_many_tokens_is_scored_in_groups(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in.csv", rows(1000))
    engine = FakeEngine(max_sweep=16)
    run(source, tmp_path / "out.csv", window_rows=None, engine=engine)
    assert len(engine.calls) == 25
    assert max(engine.calls) < 100 < sum(engine.calls) / 10, "a call holds the tokens of 64 sweeps, or a few more"
    whole = FakeEngine()
    run(source, tmp_path / "whole.csv", window_rows=None, engine=whole)
    assert len(whole.calls) == 1
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_windows_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text\n" + "".join("x" * (i % 300) + "y\n" for i in range(5000)))
    marks = open_for(source, Path("out.csv")).marks
    for size in (WindowSize(rows=1000, num_bytes=10**9), WindowSize(rows=8192, num_bytes=70_000)):
        windows = cut_windows(marks, size)
        assert windows[0].first_row == 0
        assert windows[-1].end_row == 5000
        assert all(a.end_row == b.first_row for a, b in pairwise(windows))
        assert all(0 < window.num_rows <= size.rows for window in windows)
    assert 9 <= len(windows) <= 20
    limits = EngineLimits(max_request_tokens=10, max_sweep_tokens=8192, vocab_size=10)
    assert WindowSize.planned(limits) == WindowSize(rows=8192, num_bytes=256 * 1024)
    with pytest.raises(UsageError, match="at least 1"):
        WindowSize.planned(limits, -1)


def test_metrics_count_errors_and_unknown_labels_apart(tmp_path: Path) -> None:
    table = rows(30)
    table[0]["gold"], table[1]["gold"] = "eggs", ""
    source = write_table(tmp_path / "in.csv", table)
    summary = run(source, tmp_path / "out.jsonl", label_column="gold", labels=("ham", "spam"))
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    compared = [a for a in answers if a["error"] is None and a["gold"] in ("ham", "spam")]
    assert isinstance(summary.metrics, LabelMetrics)
    assert summary.metrics.compared == len(compared)
    assert summary.metrics.accuracy == sum(a["label"] == a["gold"] for a in compared) / len(compared)
    assert summary.metrics.apart.unknown_gold == {"eggs": 1}
    assert (summary.metrics.apart.no_gold, summary.metrics.apart.with_error) == (1, 6)
    for score in summary.metrics.classes:
        hits = sum(a["label"] == a["gold"] == score.label for a in compared)
        answered = sum(a["label"] == score.label for a in compared)
        assert score.support == sum(a["gold"] == score.label for a in compared)
        assert math.isclose(score.f1, 2 * hits / (score.support + answered))
    assert math.isclose(summary.metrics.macro_f1, sum(c.f1 for c in summary.metrics.classes) / 2)


def test_values_that_are_not_finite_are_errors_of_their_rows(source: Path, tmp_path: Path) -> None:
    class Overflowing(FakeTask):
        def finish(self, prepared: PreparedRow, results: Any) -> dict[str, object]:
            values = super().finish(prepared, results)
            return {**values, "probabilities": {"ham": math.nan}} if "quoted" in str(prepared.state) else values

    class Failing(FakeEngine):
        def _one(self, request: Any) -> AtomicResult | Exception:
            return ValueError("odd") if bytes(request.tokens.astype("uint8")) == b"last8" else super()._one(request)

    summary = run(source, tmp_path / "out.csv", task=Overflowing(), engine=Failing())
    assert summary.counts.errors["not_finite"] == 4
    assert summary.counts.errors["engine_error"] == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_resume_computes_only_what_is_missing(tmp_path: Path, kind: str) -> None:
    source = write_table(tmp_path / f"in.{kind}", rows(30))
    whole, output = tmp_path / f"whole.{kind}", tmp_path / f"out.{kind}"
    complete = run(source, whole, label_column="gold")
    interrupt(source, output, label_column="gold")
    (parts_of(output) / f"part-000000.{kind}").write_bytes(b"damaged")  # is computed again
    (parts_of(output) / f".part-000003.{kind}.tmp").write_bytes(b"half")
    with (parts_of(output) / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"window": 2, "fi')
    engine = FakeEngine()
    summary = run(source, output, resume=True, engine=engine, label_column="gold")
    assert len(engine.calls) == 4
    assert summary.resumed_rows == 7
    assert (summary.counts, summary.metrics) == (complete.counts, complete.metrics)
    if kind == "parquet":
        assert pq.read_table(output).equals(pq.read_table(whole), check_metadata=True)
    else:
        assert output.read_bytes() == whole.read_bytes()
    assert not parts_of(output).exists()


def test_resume_of_a_finished_job_does_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    first = run(source, output, resume=True)  # nothing to resume: starts
    engine = FakeEngine()
    again = run(source, output, resume=True, engine=engine)
    assert engine.calls == []
    assert again.counts == first.counts
    assert not parts_of(output).exists()
    with pytest.raises(OutputError, match=r"task\.digest"):
        run(source, output, resume=True, task=FakeTask("other"))
    sidecar_path(output).unlink()
    with pytest.raises(OutputError, match="use --overwrite"):
        run(source, output, resume=True)


def other_input(source: Path) -> dict[str, Any]:
    source.write_text(source.read_text().replace("first", "First"))
    return {}


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (lambda _: {"model": {**MODEL, "weights": "w2"}}, ["model.weights", '"w1"', '"w2"']),
        (lambda _: {"model": {**MODEL, "tokenizer": "t2"}}, ["model.tokenizer"]),
        (lambda _: {"task": FakeTask("task-b")}, ["task.digest", "task-a", "task-b", "(the template, the labels"]),
        (lambda _: {"engine": FakeEngine(plan="plan-b")}, ["engine.plan"]),
        (lambda _: {"window_rows": 8}, ["windows.rows", "7 there, 8 now"]),
        (lambda _: {"limit": 20}, ["input.rows", "30 there, 20 now"]),
        (lambda _: {"shard": Shard(1, 2)}, ["shard"]),
        (lambda _: {"prefix": "new_"}, ["output.columns"]),
        (other_input, ["input.content"]),
    ],
)
def test_resume_refuses_another_job(
    source: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]], fields: list[str]
) -> None:
    output = tmp_path / "out.csv"
    interrupt(source, output)
    before = sorted(path.name for path in parts_of(output).iterdir())
    options = change(source)
    with pytest.raises(OutputError, match="belongs to another job") as caught:
        run(source, output, resume=True, **options)
    for field in fields:
        assert field in str(caught.value)
    assert sorted(path.name for path in parts_of(output).iterdir()) == before


def test_an_output_is_never_replaced_unasked(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    run(source, output)
    first = output.read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        run(source, output)
    with pytest.raises(UsageError, match="exclude"):
        run(source, output, resume=True, overwrite=True)
    interrupt(source, output, overwrite=True, limit=20)
    assert output.read_bytes() == first  # until the new one is complete
    with pytest.raises(OutputError, match=r"2 finished parts.*--resume"):
        run(source, output)
    run(source, output, overwrite=True, limit=20)
    assert output.read_bytes() != first
    assert not parts_of(output).exists()


def test_an_error_before_the_first_window_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(b"text\n\xff\n")
    with pytest.raises(InputError):
        run(source, tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_places_that_cannot_be_written_are_refused_at_once(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        run(source, tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        run(source, tmp_path / "none" / "out.csv")
    for name in ("x" * 300 + ".csv", "x" * 246 + ".csv"):  # the record of the second would be too long, not the output
        with pytest.raises(OutputError, match="File name too long"):
            run(source, tmp_path / name)


def test_pipes_and_devices_are_never_replaced(source: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="not a regular file"):
        run(source, pipe, overwrite=True)
    assert pipe.is_fifo()


def test_two_processes_cannot_write_one_output(source: Path, tmp_path: Path) -> None:
    held = FileOutput(tmp_path / "out.csv")
    with pytest.raises(OutputError, match="another process"):
        run(source, tmp_path / "out.csv")
    held.close()
    run(source, tmp_path / "out.csv")


def test_foreign_files_in_the_parts_directory_are_not_removed(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    parts_of(output).mkdir()
    (parts_of(output) / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        run(source, output)
    assert output.exists()  # the rows are not lost over it
    assert (parts_of(output) / "mine.txt").read_text() == "keep"


def test_columns_are_checked(source: Path, tmp_path: Path) -> None:
    table = [{"txt": "a", "label": "b"}]
    with pytest.raises(InputError, match=r"no column 'text' \(did you mean 'txt'\?\).*'label'"):
        run(write_table(tmp_path / "other.csv", table), tmp_path / "out.csv")
    with pytest.raises(InputError, match="no column 'golden'"):
        run(source, tmp_path / "out.csv", label_column="golden")
    clash = write_table(tmp_path / "clash.csv", [{"text": "a", "label": "b", "error": "c"}])
    with pytest.raises(UsageError, match=r"'label', 'error'.*--prefix"):
        run(clash, tmp_path / "out.csv")


def test_no_space_keeps_finished_parts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.csv"
    real = os.fsync
    calls = iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"no space left.*bytes free.*--resume"):
        run(source, output)
    monkeypatch.undo()
    assert not list(parts_of(output).glob(".*.tmp"))
    engine = FakeEngine()
    summary = run(source, output, resume=True, engine=engine)
    assert summary.resumed_rows > 0
    run(source, tmp_path / "whole.csv")
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_that_the_system_refuses_to_grow(source: Path, tmp_path: Path, kind: str) -> None:
    driver = Path(__file__).with_name("kill_driver.py")

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))

    command = [sys.executable, str(driver), str(source), str(tmp_path / f"out.{kind}"), "0"]
    result = subprocess.run(command, preexec_fn=small_files, capture_output=True, text=True, check=False)
    assert "OutputError" in result.stderr
    assert "no space left" in result.stderr
    assert subprocess.run([*command, "--resume"], check=False).returncode == 0
    assert (tmp_path / f"out.{kind}").exists()


def test_space_is_checked_beforehand(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"are needed.*are free"):
        check_space(tmp_path, 2**62)
    monkeypatch.setattr("moe_prefill.jobs.runner.least_output_bytes", lambda table, kind: 2**62)
    with pytest.raises(OutputError, match="are needed"):
        run(source, tmp_path / "out.csv")
    assert not parts_of(tmp_path / "out.csv").exists()


def test_stream_output_has_the_same_rows(source: Path, tmp_path: Path) -> None:
    for kind in ("csv", "jsonl"):
        run(source, tmp_path / f"whole.{kind}")
        stream = io.BytesIO()
        config = JobConfig(output_format=kind, window_rows=7)  # type: ignore[arg-type]
        table = open_for(source, Path("out.csv"), window_rows=7)
        run_job(table, FakeTask(), FakeEngine(), StreamOutput(stream), config, model=MODEL)
        assert stream.getvalue() == (tmp_path / f"whole.{kind}").read_bytes()


def test_spooled_input_is_read_once(tmp_path: Path) -> None:
    assert spool(io.BytesIO(b"text\na\n"), tmp_path / "input.csv").read_bytes() == b"text\na\n"
    assert spool(io.BytesIO(b"other"), tmp_path / "input.csv").read_bytes() == b"text\na\n"
