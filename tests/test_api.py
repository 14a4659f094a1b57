"""The Python interface on the demo model: what the tasks return, and mistakes that would change an answer unseen."""

from pathlib import Path

import pytest

from moe_prefill import Engine
from moe_prefill.errors import TaskError, UsageError

DEMO = Path(__file__).parent.parent / "examples" / "demo_model" / "checkpoint"


@pytest.fixture(scope="module")
def engine():
    with Engine(DEMO, dtype="float32", threads=1) as made:
        yield made


def test_every_field_of_a_result_comes_from_its_column(engine):
    (label, empty) = engine.classify(["Claim your prize now", ""], labels=["spam", "ham"])
    assert label.probability == max(label.probabilities.values()) == label.probabilities[label.label]
    assert empty.label is None
    assert empty.error.startswith("empty_text")
    (choice,) = engine.choose(["which?"], options=["first", "second"])
    assert ("AB"[choice.index], ["first", "second"][choice.index]) == (choice.identifier, choice.text)
    (selection,) = engine.select(["which?"], candidates=["a", "b"], threshold=0.0)
    assert (selection.selected, set(selection.probabilities)) == (["a", "b"], {"a", "b"})
    (ranking,) = engine.rank(["which?"], candidates=["a", "b"])
    assert [["a", "b"][i] for i in ranking.indices] == ranking.candidates
    assert ranking.scores == sorted(ranking.scores, reverse=True)
    (scoring,) = engine.score(["some words"], top_k=2)
    assert scoring.logprob == pytest.approx(sum(value for value in scoring.token_logprobs if value is not None))
    assert len(scoring.tokens) == len(scoring.token_logprobs) == scoring.num_tokens + 1  # the first has no context
    assert len(scoring.top_logprobs) == scoring.num_tokens
    assert engine.classify([], labels=["spam", "ham"]) == []


@pytest.mark.parametrize("rows", ["a text", {"text": "a text"}])
def test_one_row_is_no_list_of_rows(engine, rows):
    with pytest.raises(UsageError, match="give a list of rows"):
        engine.classify(rows, labels=["spam", "ham"])


def test_unknown_options_and_settings_are_refused(engine):
    with pytest.raises(TaskError, match="no key 'lables'"):
        engine.classify(["x"], labels=["a", "b"], lables=1)
    with pytest.raises(UsageError, match="no setting devcie"):
        Engine(DEMO, devcie="cpu")
