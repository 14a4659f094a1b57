"""What people type wrong, and how they are told: settings by the flags that they typed, values with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_prefill.cli import main


@pytest.fixture
def said(
    model: Path, tmp_path: Path, engine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run classify with these options and expect an exit code; returns standard error."""
    table = tmp_path / "in.csv"
    table.write_text("text\nhello\n")

    def run(*more: str, code: int = 2, source: Path = table, output: str = "out.csv") -> str:
        command = ["classify", str(source), "--model", str(model), "-o", str(tmp_path / output), *more]
        assert main(command) == code
        assert not (tmp_path / output).exists()
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--max-sweep-tokens", "0"], "error: --max-sweep-tokens is 0; it must be positive"),
        (["--max-sweep-tokens=-3"], "error: --max-sweep-tokens is -3; it must be positive"),
        (["--hbm-gib", "-1"], "error: --hbm-gib is -1.0; it must be positive"),
        (["--memory-gib", "-1"], "error: --memory-gib is -1.0; it must be positive"),
        (["--dtype", "float16"], "error: --dtype is 'float16'; it must be one of auto, float32, bfloat16"),
        (["--kv-gib", "-1"], "error: --kv-gib is -1.0; it must be 0"),
    ],
)
def test_an_error_names_the_flag_that_was_typed(said: Callable[..., str], option: list[str], message: str) -> None:
    assert said("--labels", "a,b", *option).startswith(message)


def test_a_key_of_a_task_file_is_named_as_it_stands_there(said: Callable[..., str], tmp_path: Path) -> None:
    task = tmp_path / "task.toml"
    task.write_text("task = 'classify'\nlabels = ['a', 'b']\ntruncate = 'top'\n")
    assert said("--task", str(task), code=4).startswith("error: truncate is 'top'")


@pytest.mark.parametrize("flag", ["--template", "--label-end", "--system"])
def test_an_escape_that_the_shell_left_is_refused(said: Callable[..., str], flag: str) -> None:
    told = said("--labels", "a,b", flag, r"{text}\nLabel:")
    assert told.startswith(rf"error: {flag} holds \n as two characters")
    assert r"$'...\n...'" in told


def test_output_is_never_plain_text_in_a_gz_file(said: Callable[..., str]) -> None:
    told = said("--labels", "a,b", "--output-format", "csv", output="out.csv.gz")
    assert "output is not compressed; leave .gz out" in told


def test_columns_that_exist_are_a_usage_error(said: Callable[..., str], tmp_path: Path) -> None:
    table = tmp_path / "again.csv"
    table.write_text("text,probability\nhello,1\n")
    assert "output column 'probability' already" in said("--labels", "a,b", source=table)


@pytest.mark.parametrize(("mark", "remedy"), [(";", "write the table with commas"), ("\t", "give --format tsv")])
def test_another_delimiter_is_guessed(said: Callable[..., str], tmp_path: Path, mark: str, remedy: str) -> None:
    table = tmp_path / "marks.csv"
    table.write_text(f"id{mark}text\n1{mark}hello\n")
    assert f"if it is the delimiter, {remedy}" in said("--labels", "a,b", source=table, code=4)


def test_no_file_is_looked_for_behind_a_pipe(said: Callable[..., str]) -> None:
    told = said("--labels", "a,b", "--output-format", "csv", output="/proc/1/fd/pipe:[7]", code=7)
    assert "or - for standard output" in told


def test_an_empty_model_is_no_working_directory(said: Callable[..., str]) -> None:
    assert "--model is needed" in said("--labels", "a,b", "--model", "")
