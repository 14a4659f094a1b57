"""The command line over a fake engine: what is written, printed and returned."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine

from moe_prefill import errors
from moe_prefill.cli import main
from moe_prefill.cli.flags import ENGINE_FLAGS, JOB_FLAGS, TASK_FLAGS, RunOptions
from moe_prefill.config import EngineConfig
from moe_prefill.jobs import sidecar_path
from moe_prefill.tasks.taskfile import CONFIGS

ENGINE_FIELDS_WITHOUT_FLAG = {"prune_last", "keep_prefixes"}  # for measurements from Python; said by serve


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_classify_writes_answers_and_a_summary(
    classify: Callable[..., int], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify("--label-column", "gold") == 0
    rows = answers(tmp_path / "out.jsonl")
    with table.open(newline="") as file:
        assert [row["text"] for row in rows] == [row["text"] for row in csv.DictReader(file)]
    assert [row["error"] is None for row in rows] == [True, True, False, True]
    assert set(rows[0]["probabilities"]) == {"ham", "spam"}
    said = capsys.readouterr()
    assert "4 rows" in said.out
    assert "1 row with error empty_text" in said.out
    assert "accuracy" in said.out
    assert "gold \\ answer" in said.out
    assert said.err.startswith("loading ")


def test_a_gold_column_without_labels_gives_no_ratios(
    classify: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "gold.csv"
    source.write_text("text,gold\na,\nb,\n")
    assert classify("--label-column", "gold", source=source) == 0
    said = capsys.readouterr().out
    assert "no row could be compared" in said
    assert "2 rows without a gold label" in said
    assert "accuracy" not in said


def test_json_mode_prints_one_summary_and_progress(
    classify: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify("--json", "--label-column", "gold", "--window-rows", "2") == 0
    said = capsys.readouterr()
    (summary,) = [json.loads(line) for line in said.out.splitlines()]
    assert (summary["rows"], summary["errors"]) == (4, {"empty_text": 1})
    assert summary["metrics"]["compared"] == 3
    loading, *progress = [json.loads(line) for line in said.err.splitlines()]
    assert loading["event"] == "loading"
    assert [(line["rows"], line["total_rows"]) for line in progress] == [(2, 4), (4, 4)]


def test_quiet_says_nothing(classify: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert classify("--quiet") == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_loading_is_announced_with_its_size(
    classify: Callable[..., int], model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify("--dtype", "float32") == 0
    assert capsys.readouterr().err == f"loading {model} (0 MB, float32)\n"
    assert classify("--json", "--overwrite", "--device", "cpu") == 0
    first = json.loads(capsys.readouterr().err.splitlines()[0])
    assert first == {"event": "loading", "model": str(model), "bytes": 7, "dtype": None, "device": "cpu"}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert classify("--overwrite") == 0
    assert "0:00:00" in capsys.readouterr().err


def test_a_hub_model_is_pinned_to_its_commit(
    engine: Callable[..., None], table: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_prefill.checkpoint import resolve

    snapshot = tmp_path / "models--some--model/snapshots/0a1b2c"
    shutil.copytree(model, snapshot)
    asked, configs = [], []
    monkeypatch.setattr(
        resolve, "snapshot_download", lambda name, **options: asked.append((name, options["revision"])) or str(snapshot)
    )
    engine(lambda config: configs.append(config) or FakeEngine(max_request=4096))
    command = ["classify", str(table), "--labels", "ham,spam", "--quiet", "--model", "some/model", "--revision", "v2"]
    out = tmp_path / "out.jsonl"
    assert main([*command, "-o", str(out)]) == 0
    assert asked[0] == ("some/model", "v2")
    assert {*asked[1:]} == {("some/model", "0a1b2c")}
    assert configs[0].revision == "0a1b2c"
    assert json.loads(sidecar_path(out).read_text())["identity"]["model.revision"] == "0a1b2c"

    asked.clear()
    assert main([*command, "--tokenizer", "other/tokenizer", "-o", str(tmp_path / "other.jsonl")]) == 0
    assert ("other/tokenizer", None) in asked  # the revision is the model's


def test_a_directory_has_no_revision(classify: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert classify("--revision", "main") == errors.UsageError.exit_code
    assert "--revision main" in capsys.readouterr().err


def test_standard_streams(
    classify: Callable[..., int],
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    class Stdin:
        buffer = io.BytesIO(table.read_bytes())

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert classify(source="-") == 2  # which format?
    assert classify("--format", "csv", source="-") == 0
    piped = (tmp_path / "out.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []
    capfdbinary.readouterr()
    assert classify(output="-") == 0
    said = capfdbinary.readouterr()
    assert said.out == piped
    assert b"4 rows" in said.err
    assert classify("--output-format", "parquet", output="-") == 2
    assert classify("--resume", output="-") == 2


def test_a_task_file_and_options_that_win(
    table: Path, model: Path, tmp_path: Path, engine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "task.toml"
    task.write_text('task = "classify"\ntemplate = "Text {text} label:"\nlabels = ["a", "b"]\noutput_prefix = "p_"\n')
    common = ["--model", str(model), "--task", str(task), "-q"]
    assert main(["classify", str(table), *common, "-o", str(tmp_path / "a.jsonl")]) == 0
    assert set(answers(tmp_path / "a.jsonl")[0]["p_probabilities"]) == {"a", "b"}
    assert "p_error" in answers(tmp_path / "a.jsonl")[0]
    assert main(["classify", str(table), *common, "--labels", '["x, y", "z"]', "-o", str(tmp_path / "b.jsonl")]) == 0
    assert set(answers(tmp_path / "b.jsonl")[0]["p_probabilities"]) == {"x, y", "z"}
    assert main(["rank", str(table), *common, "-o", str(tmp_path / "c.jsonl")]) == 4
    assert "run `moe-prefill classify`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("choose", ["--options", "one,two"]),
        ("select", ["--candidates", "one,two", "--threshold", "0.4"]),
        ("rank", ["--candidates", "one,two,three", "--top-n", "2"]),
        ("score", []),
    ],
)
def test_the_other_tasks(
    table: Path, model: Path, tmp_path: Path, engine: Callable[..., None], kind: str, options: list[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert main([kind, str(table), "--model", str(model), *options, "-o", str(output), "-q"]) == 0
    rows = answers(output)
    assert [row["error"] is None for row in rows] == [True, True, False, True]
    assert len(rows[0]) > 4


def test_dry_run_needs_no_engine_and_no_output(
    table: Path, model: Path, engine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: EngineConfig) -> None:
        raise AssertionError("no engine is needed")

    engine(refuse)
    before = sorted(table.parent.iterdir())
    assert main(["classify", str(table), "--model", str(model), "--labels", "ham,spam", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "row 1" in said
    assert "boundary" in said
    assert "'spam'" in said
    assert "4 rows; errors among the first 4: 1" in said
    assert "tokens in all" in said
    assert "tokens/s" in said
    assert sorted(table.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.MoePrefillError, 1),
        (errors.UsageError, 2),
        (errors.InputError, 3),
        (errors.TaskError, 4),
        (errors.ModelError, 5),
        (errors.PlanError, 6),
        (errors.OutputError, 7),
        (errors.WorkerError, 8),
        (KeyboardInterrupt, 130),
        (RuntimeError, 70),
    ],
)
def test_every_error_has_its_exit_code(
    classify: Callable[..., int],
    engine: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
    code: int,
) -> None:
    def fail(config: EngineConfig) -> None:
        raise error("some words")

    engine(fail)
    assert classify("--quiet") == code
    said = capsys.readouterr()
    assert said.out == ""
    if code == 130:
        assert "--resume" in said.err
    else:
        assert "some words" in said.err
    assert ("Traceback" in said.err) == (code == 70)
    assert ("report" in said.err) == (code == 70)
    if issubclass(error, errors.MoePrefillError):
        assert said.err == "error: some words\n"
        assert classify("--debug") == code
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["classify", "{table}", "--labels", "a,b", "-o", "{out}"], 2, "--model"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b"], 2, "-o"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "x.xml"], 2, "--output-format"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "{out}", "--limit", "0"], 2, "--limit"),
        (
            ["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "{out}", "--window-rows", "0"],
            2,
            "--window",
        ),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "{out}", "--shard", "3/2"], 2, "--shard"),
        (["classify", "{table}", "-m", "{model}", "--labels", "[1]", "-o", "{out}"], 2, "strings"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "{out}", "--boundary", "x"], 2, "boundary"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "{out}", "--threads", "0"], 2, "threads"),
        (["classify", "{table}.none", "-m", "{model}", "--labels", "a,b", "-o", "{out}"], 3, "no such file"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "{table}", "--overwrite"], 3, "input"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "{table}"], 7, "exists"),
        (["classify", "{table}", "-m", "{model}", "-o", "{out}"], 4, "labels"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,a", "-o", "{out}"], 4, "'a'"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "--template", "{{x}}", "-o", "{out}"], 4, "x"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a", "-o", "{out}"], 4, "always 1"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "--template", "x", "-o", "{out}"], 4, "no column"),
        (
            ["classify", "{table}", "-m", "{model}", "--labels", "a,b", "--template", "{{txt}}", "-o", "{out}"],
            4,
            "did you mean 'text'",
        ),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "{model}"], 7, "is a directory"),
        (["classify", "{table}", "-m", "{model}/none", "--labels", "a,b", "-o", "{out}"], 5, "directory"),
        (["classify", "{table}", "-m", "{model}", "--labels", "a,b", "-o", "/none/out.csv"], 7, "does not exist"),
        (["frobnicate"], 2, "No such command"),
        (["merge", "{table}", "-o", "{out}"], 2, "all shards"),
    ],
)
def test_mistakes_are_explained_before_any_work(
    table: Path,
    model: Path,
    tmp_path: Path,
    engine: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    def refuse(config: EngineConfig) -> None:
        raise AssertionError("found too late")

    engine(refuse)
    names = {"table": table, "model": model, "out": tmp_path / "out.csv"}
    assert main([argument.format(**names) for argument in arguments]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    assert not (tmp_path / "out.csv.parts").exists()


def test_an_added_column_that_exists_is_refused(
    model: Path, tmp_path: Path, engine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,error\na,b\n")
    command = ["classify", str(source), "-m", str(model), "--labels", "a,b", "-o", str(tmp_path / "out.csv")]
    assert main(command) == 2
    assert "--prefix" in capsys.readouterr().err
    assert main([*command, "--prefix", "new_", "-q"]) == 0
    assert (tmp_path / "out.csv").read_text().startswith("text,error,new_")


def test_every_config_field_has_its_option() -> None:
    assert {*ENGINE_FLAGS} | ENGINE_FIELDS_WITHOUT_FLAG == {*EngineConfig.__dataclass_fields__}
    assert {*JOB_FLAGS} == {*RunOptions.__dataclass_fields__}
    fields = {name for config in CONFIGS.values() for name in config.__dataclass_fields__}
    assert {*TASK_FLAGS} == fields


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main(["classify", "--help"]) == 0
    assert "--truncate" in capsys.readouterr().out
