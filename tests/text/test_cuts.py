"""Texts encoded in pieces have the ids of texts encoded whole, and pieces are used only where that is certain."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from moe_prefill.text import Tokenizer
from moe_prefill.text.cuts import make_cut_rule
from moe_prefill.text.files import load_files
from tests.text.tokenizers_for_tests import REAL, real, real_directory, write_small

_BITS = [
    *" \n\t.'\"<>|:/-_▁0129abzéA",
    *[
        "  ",
        "\r\n",
        " \n",
        "' s",
        "'s",
        "n't",
        "日本",
        "語。",
        "क़",
        "e\u0301",
        "\u0301",
        "👍🏽",
        "👩‍👩‍👧",
        "\u00a0",
        "\u3000",
    ],
    *["word", " word", " the", "Answer:", "<s>", "</s>", "<|im_end|>", "<\uff5cUser\uff5c>", "<|return|>", "123456"],
    *["한국어", "ᄀ", "ᅡ", "ﷺ", "½", "①", "\u200d", "\x1c", "\u0085"],
]
texts = st.lists(st.sampled_from(_BITS), max_size=14).map("".join)


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=150, deadline=None)
@given(head=texts, middle=texts, tails=st.lists(texts, min_size=1, max_size=4))
def test_pieces_equal_the_whole(name: str, head: str, middle: str, tails: list[str]) -> None:
    tokenizer = real(name)
    context = head + middle
    whole = [context, *(context + tail for tail in tails)]
    (related,) = tokenizer.encode_continued([(context, len(head), tails)])
    for text, ids, expected in zip(whole, related, tokenizer.encode_batch(whole), strict=True):
        assert ids.tolist() == expected.tolist(), (text, len(head), len(context))


def _with_marks(scheme: str, split: bool) -> Tokenizer:
    """Mistral's vocabulary with the pre-tokenizer that newer conversions write instead of a normalizer."""
    files = load_files(real_directory("llama2"))
    files.backend.normalizer = None
    files.backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return Tokenizer(files)


def _with_runs() -> Tokenizer:
    """Runs of spaces as added tokens, as in GPT-NeoX's vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        files = load_files(write_small(Path(folder)))
    files.backend.add_tokens([tokenizers.AddedToken(" " * size, normalized=True) for size in (4, 3, 2)])
    return Tokenizer(files)


@pytest.mark.parametrize("layout", ["first", "always", "split", "runs"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_other_layouts(layout: str, data: st.DataObject) -> None:
    tokenizer = _layout(layout)
    assert tokenizer._cuts is not None
    context = data.draw(texts)
    tails = data.draw(st.lists(texts, min_size=1, max_size=3))
    whole = [context, *(context + tail for tail in tails)]
    (related,) = tokenizer.encode_continued([(context, len(context) // 2, tails)])
    for text, ids, expected in zip(whole, related, tokenizer.encode_batch(whole), strict=True):
        assert ids.tolist() == expected.tolist(), (text, len(context))


@functools.cache
def _layout(layout: str) -> Tokenizer:
    if layout == "runs":
        return _with_runs()
    return _with_marks("always" if layout == "always" else "first", layout == "split")


@pytest.mark.parametrize("name", REAL)
def test_published_tokenizers_have_a_rule_and_use_it(name: str) -> None:
    tokenizer = real(name)
    context = "A long text with many words that is tokenised once.\nLabel:"
    pieces = {piece for label in (" a", " b", " c") for piece in tokenizer._pieces(context + label, [len(context)])}
    shared = max(pieces, key=len)
    assert len(pieces) == 4, pieces
    assert len(shared) > len(context) - 20
    assert all(len(piece) < 20 for piece in pieces - {shared})


def test_no_rule_where_the_structure_is_unknown(tmp_path: Path) -> None:
    backend = Tokenizer.from_directory(write_small(tmp_path)).backend
    assert make_cut_rule(backend) is not None
    backend.add_tokens([tokenizers.AddedToken("two words")])
    assert make_cut_rule(backend) is None, "an added token may reach over a space"
    odd = tokenizers.Tokenizer(models.BPE())
    pattern = tokenizers.Regex(r"\w+ \w+|\s+")
    odd.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    assert make_cut_rule(odd) is None, "an unknown expression may reach over a space"
    marks = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "▁": 1, "a▁": 2}, merges=[("a", "▁")]))
    marks.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert make_cut_rule(marks) is None, "a token may end in a word mark"
