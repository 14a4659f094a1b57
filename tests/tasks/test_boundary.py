"""Contexts and labels meet on the tokens of the whole text, with real tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.errors import RowError
from moe_prefill.tasks.boundary import Split, Spot, split_spots
from tests.text.tokenizers_for_tests import REAL, real

_BITS = [
    *" \n.:!?ab",
    " yes",
    "no",
    "日本",
    "否",
    "👍🏽",
    "\u200d",
    "é",
    "\u0301",
    "Answer:",
    "12",
    "3",
    "'",
    "s",
    "</s>",
]
texts = st.lists(st.sampled_from(_BITS), max_size=8).map("".join)


def _joined(split: Split, i: int) -> list[int]:
    return [*split.context.tolist(), *split.labels[i]]


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=100, deadline=None)
@given(context=texts, labels=st.lists(texts.filter(bool), min_size=1, max_size=3))
def test_strict_splits_have_the_tokens_of_the_whole(name: str, context: str, labels: list[str]) -> None:
    tokenizer = real(name)
    (split,) = split_spots(tokenizer, [Spot(context, tuple(labels))])
    wholes = [tokenizer.encode(context + label).tolist() for label in labels]
    contexts = [tokenizer.encode(text).tolist() for text in (context, context.rstrip())]
    fitting = [ids for ids in contexts if ids and all(whole[: len(ids)] == ids for whole in wholes)]
    if isinstance(split, RowError):
        assert not fitting
    else:
        assert split.context.tolist() == fitting[0]
        assert [_joined(split, i) for i in range(len(labels))] == wholes


@pytest.mark.parametrize("name", REAL)
def test_usual_prompts_need_no_move(name: str) -> None:
    tokenizer = real(name)
    context = "Text: a day\nLabel:"
    (split,) = split_spots(tokenizer, [Spot(context, (" spam", " not spam"))])
    assert isinstance(split, Split)
    assert split.context.tolist() == tokenizer.encode(context).tolist()
    assert len(split.labels[1]) == len(split.labels[0]) + 1


@pytest.mark.parametrize("name", REAL)
def test_trailing_spaces_move_to_the_label(name: str) -> None:
    tokenizer = real(name)
    moved, plain = split_spots(tokenizer, [Spot("Label: ", ("spam",)), Spot("Label:", (" spam",))])
    assert isinstance(moved, Split)
    assert isinstance(plain, Split)
    assert moved.context.tolist() == plain.context.tolist()
    assert moved.labels == plain.labels


@pytest.mark.parametrize("name", REAL)
def test_a_label_that_merges_is_an_error_unless_split(name: str) -> None:
    tokenizer = real(name)
    spot = Spot("The wor", ("ld", "k"))
    (error,) = split_spots(tokenizer, [spot])
    assert isinstance(error, RowError)
    assert error.code == "label_boundary"
    assert "'ld' merges" in str(error)
    assert "--boundary split" in str(error)
    (split,) = split_spots(tokenizer, [spot], "split")
    assert isinstance(split, Split)
    assert split.context.tolist() == tokenizer.encode("The wor").tolist()
    assert [tokenizer.decode(np.array(label)) for label in split.labels] == ["ld", "k"]


def test_one_label_that_needs_the_move_moves_all() -> None:
    tokenizer = real("qwen3")
    (split,) = split_spots(tokenizer, [Spot("Answer: ", ("yes", "\n"))])
    assert isinstance(split, Split)
    assert split.context.tolist() == tokenizer.encode("Answer:").tolist()
    assert [_joined(split, i) for i in range(2)] == [tokenizer.encode(f"Answer: {x}").tolist() for x in ("yes", "\n")]


@pytest.mark.parametrize("name", ["llama2", "deepseek_v3"])
def test_begin_token_once(name: str) -> None:
    tokenizer = real(name)
    spots = [Spot("Hello", (" x",)), Spot(f"{tokenizer.bos}Hello", (" x",)), Spot("", ("x",))]
    for add_bos, counts in ((True, [1, 1, 1]), (False, [0, 1, None])):
        splits = split_spots(tokenizer, spots, add_bos=add_bos)
        found = [s.context.tolist().count(tokenizer.bos_id) if isinstance(s, Split) else None for s in splits]
        assert found == counts
    assert isinstance(splits[2], RowError)
    assert splits[2].code == "empty_text"
