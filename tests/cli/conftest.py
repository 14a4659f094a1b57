"""A tiny tokenizer directory and an engine without weights."""

from __future__ import annotations

import csv
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

from fakes import FakeEngine

from moe_prefill.cli import main

TEXTS = ["first", "second, with comma", "", "last"]
CHAT = "{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a byte-level tokenizer, a config, and weights that only their fingerprint sees."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|end|>"], initial_alphabet=alphabet, vocab_size=300)
    tokenizer.train_from_iterator(["spam ham text Text label Label yes no Yes No"] * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "add_bos_token": False, "chat_template": CHAT})
    )
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "max_position_embeddings": 4096}))
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make ``build_engine`` return a FakeEngine (or what is given), without importing torch's half; its settings are
    those that were given.
    """

    def use(build: Callable[[Any], Any] = lambda config: FakeEngine(max_request=4096)) -> None:
        module = types.ModuleType("moe_prefill.engine")
        module.build_engine = build  # type: ignore[attr-defined]
        module.plan_settings = lambda config: {"dtype": config.dtype, "sharing": config.sharing}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "moe_prefill.engine", module)

    use()
    return use


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text", "gold"], *([i, t, "ham"] for i, t in enumerate(TEXTS))])
    return path


@pytest.fixture
def classify(table: Path, model: Path, tmp_path: Path, engine: Callable[..., None]) -> Callable[..., int]:
    def run(*more: str, source: str | Path = table, output: str | Path = tmp_path / "out.jsonl") -> int:
        return main(["classify", str(source), "--model", str(model), "--labels", "ham,spam", "-o", str(output), *more])

    return run
