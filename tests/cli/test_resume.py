"""Jobs of the command line that are gone on with, and shards that are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine

from moe_prefill.cli import main
from moe_prefill.config import EngineConfig


def test_resume_takes_the_sizes_that_the_job_began_with(
    classify: Callable[..., int], engine: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int | None, int | None]] = []

    class Stops(FakeEngine):
        def score(self, requests: Any) -> Any:
            if len(self.calls) == 1:
                raise KeyboardInterrupt
            return super().score(requests)

    def build(config: EngineConfig) -> FakeEngine:
        seen.append((config.max_sweep_tokens, config.chunk_rows))
        kind = Stops if len(seen) == 1 else FakeEngine
        made = kind(max_request=4096, max_sweep=config.max_sweep_tokens or 1000 + len(seen))
        made.limits = dataclasses.replace(made.limits, chunk_rows=config.chunk_rows or 256 * len(seen))
        return made

    engine(build)
    assert classify("--window-rows", "2") == 130
    assert classify("--window-rows", "2") == 7
    assert classify("--window-rows", "2", "--resume") == 0
    assert seen == [(None, None), (1001, 256)]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    capsys.readouterr()
    engine(lambda config: pytest.fail("loaded"))
    assert classify("--resume", "--window-rows", "2") == 0  # finished: nothing to do
    assert "4 rows (4 of them by earlier runs)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--dtype", "float32"), 'engine.dtype: "auto" there, "float32" now'),
        (("--max-sweep-tokens", "9"), "engine.max_sweep_tokens: 4096 there, 9 now"),
        (("--limit", "2"), "input.rows: 4 there, 2 now"),
        (("--template", "Is {text} spam?"), "task.digest"),
    ],
)
def test_another_job_is_refused_before_its_model_is_loaded(
    classify: Callable[..., int],
    engine: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    told: str,
) -> None:
    class Stops(FakeEngine):
        def score(self, requests: Any) -> Any:
            raise KeyboardInterrupt

    engine(lambda config: Stops(max_request=4096, max_sweep=4096))
    assert classify() == 130
    engine(lambda config: pytest.fail("loaded"))
    assert classify("--resume", *options) == 7
    assert told in capsys.readouterr().err
    engine()
    assert classify("--overwrite") == 0
    engine(lambda config: pytest.fail("loaded"))
    assert classify("--resume", *options) == 7


def test_a_resumed_chat_job_goes_on_with_its_day(
    classify: Callable[..., int], engine: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stops(FakeEngine):
        def score(self, requests: Any) -> Any:
            if self.calls:
                raise KeyboardInterrupt
            return super().score(requests)

    engine(lambda config: Stops(max_request=4096))
    assert classify("--window-rows", "1", "--chat", "--chat-date", "2001-02-03") == 130
    engine()
    assert classify("--window-rows", "1", "--chat", "--chat-date", "2001-02-04", "--resume") == 7
    assert "2001-02-03" in capsys.readouterr().err
    assert classify("--window-rows", "1", "--chat", "--resume") == 0


def test_shards_and_merge(classify: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify("--window-rows", "1") == 0
    shards = [tmp_path / f"s{i}.jsonl" for i in (1, 2, 3)]
    for i, shard in enumerate(shards, start=1):
        assert classify("--window-rows", "1", "--shard", f"{i}/3", output=shard) == 0
    merged = tmp_path / "merged.jsonl"
    assert main(["merge", *map(str, shards), "-o", str(merged)]) == 0
    assert merged.read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert "4 rows" in capsys.readouterr().out
    assert main(["merge", *map(str, shards[:2]), "-o", str(tmp_path / "m2.jsonl")]) == 3
