"""Templates and a row's values as text."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prefill.errors import RowError, TaskError
from moe_prefill.tasks.prompts import common_length, cut_text
from moe_prefill.tasks.template import Template, as_text, list_of


@given(text=st.text(), value=st.text())
def test_escapes_and_values_are_kept(text: str, value: str) -> None:
    source = text.replace("{", "{{").replace("}", "}}") + "{a column}" + "{{}}"
    template = Template.parse(source)
    assert template.names == ("a column",)
    assert template.render({"a column": value}) == text + value + "{}"


@pytest.mark.parametrize("source", ["{", "a } b", "{}", "{ }", "{a{b}}", "{{{a}}", "{open"])
def test_stray_braces_are_named(source: str) -> None:
    with pytest.raises(TaskError, match="the template has a stray"):
        Template.parse(source)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.arange(2000), str(list(range(2000)))),
        (np.array(["é", "b"]), '["é", "b"]'),
        ({"a": np.array([1.5])}, '{"a": [1.5]}'),
        (np.float32(0.1), "0.1"),
        (3, "3"),
        (2.5, "2.5"),
        (True, "true"),
        (None, ""),
        (b"x", "x"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (decimal.Decimal("1.10"), "1.10"),
        (["a", "é"], '["a", "é"]'),
        (np.float64(0.5), "0.5"),
    ],
)
def test_values_stand_as_in_the_table(value: object, text: str) -> None:
    assert as_text(value) == text


def test_lists_come_as_lists_json_or_arrays() -> None:
    for value in (["a", 1], '["a", 1]', ("a", 1)):
        assert list_of({"c": value}, "c") == ["a", 1]
    assert list_of({"c": np.array([1, 2])}, "c") == [1, 2]
    with pytest.raises(RowError, match=r"holds '[0-9]+'; a list"):
        list_of({"c": 3}, "c")


@given(texts=st.lists(st.text(alphabet="ab", max_size=6), min_size=1, max_size=5))
def test_common_length(texts: list[str]) -> None:
    size = common_length(texts)
    assert len({text[:size] for text in texts}) == 1
    assert min(map(len, texts)) == size or len({text[: size + 1] for text in texts}) > 1


def test_cuts_take_tokens_from_the_stated_side() -> None:
    text = "a b c d e"
    spans = [(i, i + 1) for i in range(0, 9, 2)]
    assert cut_text(text, spans, 2, "left") == "c d e"
    assert cut_text(text, spans, 2, "right") == "a b c "
    assert cut_text(text, spans, 2, "middle") == "a d e"
