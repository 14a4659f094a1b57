"""Ids equal those of transformers, the begin token comes once, and files are read as Hugging Face lays them out."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_prefill.errors import ModelError
from moe_prefill.text import Tokenizer
from tests.text.tokenizers_for_tests import REAL, real, real_directory, write_small

TEXTS = [
    "Hello world",
    " leading and  double  spaces ",
    "line\nbreaks\r\n\n and\ttabs",
    "Grüße, naïve café, 12345 + 67.8%",
    "日本語のテキスト。中文字符 and English",
    "👩‍👩‍👧‍👦 family 🎉🎉",
    "e\u0301 combining \u0928\u093c",
    "<s>[INST] x [/INST]</s><|im_start|>user\n",
    "",
]


@pytest.mark.parametrize("name", REAL)
def test_ids_equal_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(real_directory(name))
    ours = real(name).encode_batch(TEXTS, add_special_tokens=False)
    for text, ids in zip(TEXTS, ours, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == reference.encode(text, add_special_tokens=False), text


def test_begin_token_of_published_models() -> None:
    begins = {name: real(name).encode("Hello").tolist()[0] for name in REAL}
    assert begins["llama2"] == real("llama2").bos_id == 1  # by its post-processor and its config
    assert begins["deepseek_v3"] == real("deepseek_v3").bos_id == 0  # by its config only
    assert not len(real("qwen3").prefix_ids)
    assert real("qwen3").bos_id is None
    assert not len(real("gptoss").prefix_ids)  # has a begin token and does not add it


@pytest.mark.parametrize("name", ["llama2", "deepseek_v3"])
def test_a_text_with_its_own_begin_token_gets_no_second(name: str) -> None:
    tokenizer = real(name)
    ids = tokenizer.encode(f"{tokenizer.bos}Hello").tolist()
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id


@pytest.mark.parametrize(("stated", "expected"), [(True, [0]), (False, []), (None, [])])
def test_config_decides_about_the_begin_token(tmp_path: Path, stated: bool | None, expected: list[int]) -> None:
    tokenizer = Tokenizer.from_directory(write_small(tmp_path, add_bos_token=stated))
    assert tokenizer.prefix_ids.tolist() == expected


def test_post_processor_decides_where_the_config_is_silent(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    write_small(tmp_path, add_bos_token=None)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.prefix_ids.tolist() == [0]
    assert tokenizer.encode("dog").tolist()[-1] != 1, "an end token would close the context"


def test_stored_truncation_and_padding_are_off(tmp_path: Path) -> None:
    write_small(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert 4 < len(Tokenizer.from_directory(tmp_path).encode("the quick brown fox jumps over 123456")) < 64


def test_added_tokens_that_only_the_config_lists(tmp_path: Path) -> None:
    write_small(tmp_path)
    size = Tokenizer.from_directory(tmp_path).vocab_size
    write_small(tmp_path, added_tokens_decoder={str(size): {"content": "<new>", "special": True}})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("dog<new>")[-1] == size
    assert tokenizer.vocab_size == size + 1
    write_small(tmp_path, added_tokens_decoder={str(size + 7): {"content": "<new>", "special": True}})
    with pytest.raises(ModelError, match="do not belong together"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": ["<|x|>", " the"]}),
        ("tokenizer_config.json", {"image_token": "<|x|>"}),
        ("tokenizer_config.json", {"extra_special_tokens": {"some_token": "<|x|>"}}),
        (
            "tokenizer_config.json",
            {
                "pad_token": "<|x|>",
                "additional_special_tokens": [{"__type": "AddedToken", "content": "fox", "lstrip": True}],
            },
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<|end|>", "rstrip": True}}}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|x|>"]}),
        ("added_tokens.json", {"<|x|>": "the next id"}),
    ],
)
def test_added_tokens_of_every_file_are_those_of_transformers(tmp_path: Path, name: str, stated: dict) -> None:
    transformers = pytest.importorskip("transformers")
    write_small(tmp_path)
    size = Tokenizer.from_directory(tmp_path).vocab_size
    file = tmp_path / name
    before = json.loads(file.read_text()) if file.is_file() else {}
    stated = {key: size if value == "the next id" else value for key, value in stated.items()}
    file.write_text(json.dumps(before | stated))
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    text = "the  <|x|> dog<|x|>s</s> and the fox<|end|> yes"
    assert ours.encode(text, add_special_tokens=False).tolist() == reference.encode(text, add_special_tokens=False)
    (tmp_path / name).write_text(json.dumps(before))
    plain = Tokenizer.from_directory(tmp_path)
    assert ours.encode(text).tolist() != plain.encode(text).tolist()
    assert ours.fingerprint != plain.fingerprint


def test_special_tokens_may_be_objects_or_come_from_the_older_file(tmp_path: Path) -> None:
    write_small(tmp_path, bos_token=None, eos_token={"__type": "AddedToken", "content": "<|end|>"})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos, tokenizer.bos_id) == ("<s>", 0)
    assert (tokenizer.eos, tokenizer.eos_id) == ("<|end|>", 2)


@pytest.mark.parametrize("name", REAL)
def test_decode_and_token_strings(name: str) -> None:
    tokenizer = real(name)
    text = "Hello world, 日本 café"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.token_string(token) for token in tokenizer.encode("Answer: yes no").tolist()[-2:]]
    assert pieces == [" yes", " no"]
    assert tokenizer.token_string(tokenizer.eos_id) == tokenizer.eos


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("label", [" yes", "yes", "\nno", "否"])
def test_continuation_tokens_write_out_the_continuation(name: str, label: str) -> None:
    tokenizer = real(name)
    context = tokenizer.encode("Is it so? Answer:", add_special_tokens=False)
    ids = np.concatenate([context, tokenizer.encode_continuation(label)])
    assert tokenizer.decode(ids) == "Is it so? Answer:" + label


def test_offsets_cover_the_text(real_tokenizer: Tokenizer) -> None:
    text = "one two  three 日本 end"
    spans = real_tokenizer.offsets(text)
    assert len(spans) == len(real_tokenizer.encode(text, add_special_tokens=False))
    assert spans[-1][1] == len(text)
    assert all(start <= later for (start, _), (later, _) in itertools.pairwise(spans))


def test_fingerprint_follows_the_files(tmp_path: Path, small_directory: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_directory, copy)
    before = Tokenizer.from_directory(small_directory).fingerprint
    assert Tokenizer.from_directory(copy).fingerprint == before
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer.from_directory(copy).fingerprint != before


def test_an_older_format_is_converted(tmp_path: Path, small_directory: Path) -> None:
    pytest.importorskip("transformers")
    model = json.loads((small_directory / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [entry if isinstance(entry, str) else " ".join(entry) for entry in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    stated = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    converted, direct = Tokenizer.from_directory(tmp_path), Tokenizer.from_directory(small_directory)
    text = "the quick brown fox, 123"
    assert converted.encode(text, add_special_tokens=False).tolist() == (
        direct.encode(text, add_special_tokens=False).tolist()
    )


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        Tokenizer.from_directory(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    write_small(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list"):
        Tokenizer.from_directory(tmp_path)


def test_the_rooms_import_neither_torch_nor_transformers() -> None:
    code = "import sys, moe_prefill.text, moe_prefill.tasks; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
