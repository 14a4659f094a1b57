"""Choices: identifiers in the prompt, options from every source, limits on their number."""

from __future__ import annotations

import numpy as np
import pytest

from moe_prefill.core import PreparedRow
from moe_prefill.errors import TaskError
from moe_prefill.tasks import ChooseConfig, build_task
from moe_prefill.text import Tokenizer
from tests.tasks.fake_model import LIMITS, WIDE, logprob, run
from tests.text.tokenizers_for_tests import REAL, real

ROW = {"text": "Is it a day?", "a": "yes", "b": "no", "c": None, "list": '["good", "bad", 3]'}
PROMPT = "Is it a day?\n\nA. yes\nB. no\n\nAnswer:"


def test_probabilities_equal_the_direct_sums(small: Tokenizer) -> None:
    (values,) = run(build_task(ChooseConfig(option_columns=("a", "b", "c")), small, LIMITS), ROW)
    assert isinstance(values, dict)
    context = small.encode(PROMPT).tolist()
    sums = [logprob(context, small.encode(PROMPT + one).tolist()[len(context) :]) for one in (" A", " B")]
    expected = np.exp(sums) / np.exp(sums).sum()
    np.testing.assert_allclose(list(values["probabilities"].values()), expected, rtol=1e-4)
    best = int(expected.argmax())
    assert values["choice"] == "AB"[best]
    assert values["choice_index"] == best
    assert values["choice_text"] == ("yes", "no")[best]


def test_options_come_from_columns_a_list_or_the_task(small: Tokenizer) -> None:
    by_columns = run(build_task(ChooseConfig(option_columns=("a", "b")), small, LIMITS), ROW)
    fixed = run(build_task(ChooseConfig(options=("yes", "no")), small, LIMITS), ROW)
    listed = run(build_task(ChooseConfig(options_column="list"), small, LIMITS), {**ROW, "list": ["yes", "no"]})
    assert by_columns == fixed == listed
    (values,) = run(build_task(ChooseConfig(options_column="list"), small, LIMITS), ROW)
    assert isinstance(values, dict)
    assert list(values["probabilities"]) == ["A", "B", "C"]


def test_digits(small: Tokenizer) -> None:
    task = build_task(ChooseConfig(options=("yes", "no"), identifiers="digits"), small, LIMITS)
    (prepared,) = task.prepare([ROW])
    assert isinstance(prepared, PreparedRow)
    assert "\n\n1. yes\n2. no\n\n" in small.decode(task.preview(prepared)[0].context)


def test_too_many_options(small: Tokenizer) -> None:
    with pytest.raises(TaskError, match="27 options are more than the 26 identifiers A to Z"):
        build_task(ChooseConfig(options=("x",) * 27), small, LIMITS)
    with pytest.raises(TaskError, match="10 options are more than the 9 identifiers 1 to 9"):
        build_task(ChooseConfig(options=("x",) * 10, identifiers="digits"), small, LIMITS)
    task = build_task(ChooseConfig(options_column="list"), small, LIMITS)
    lists = [["x"] * 26, ["x"] * 27, [], ["a", ""], None, "[1", "{}"]
    codes = [value if isinstance(value, str) else "" for value in run(task, *({**ROW, "list": one} for one in lists))]
    assert codes == ["", "too_many_options", "no_options", "empty_text", "empty_text", "bad_list", "bad_list"]


def test_a_gap_between_options_is_an_error(small: Tokenizer) -> None:
    task = build_task(ChooseConfig(option_columns=("a", "c", "b")), small, LIMITS)
    assert run(task, ROW, {"text": "x"}) == ["empty_text", "no_options"]


def test_exactly_one_source_and_known_columns(small: Tokenizer) -> None:
    with pytest.raises(TaskError, match="exactly one of"):
        ChooseConfig()
    with pytest.raises(TaskError, match="2 of them were given"):
        ChooseConfig(options=("x",), options_column="list")
    with pytest.raises(TaskError, match="no column 'd'"):
        build_task(ChooseConfig(option_columns=("a", "d")), small, LIMITS, list(ROW))


@pytest.mark.parametrize("name", REAL)
def test_identifiers_are_single_tokens_of_published_tokenizers(name: str) -> None:
    task = build_task(ChooseConfig(options=tuple(f"option {i}" for i in range(26))), real(name), WIDE)
    (prepared,) = task.prepare([ROW])
    assert isinstance(prepared, PreparedRow)
    (request,) = prepared.requests
    assert len(request.ids) == 26
    assert not request.vocabulary
