"""The Python interface on the demo model: what the tasks return, and mistakes that would change an answer unseen."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moe_prefill import Engine
from moe_prefill.api import fields_named
from moe_prefill.cli.flags import ENGINE_FLAGS, TASK_FLAGS
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


class Frame:
    """What a pandas data frame is to a loop: its columns' names."""

    columns = ("text", "id")

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Frame(), r"rows is a Frame; .*rows\.to_dict\('records'\)"),
        (pa.table({"text": ["a"]}), r"rows is a Table; .*rows\.to_pylist\(\)"),
        (None, "rows is None; give a list"),
        (b"text", "rows is one bytes"),
        ([{1: "a"}], "column 1 of type int"),
    ],
)
def test_rows_that_would_be_taken_apart_are_refused(engine, rows, message):
    with pytest.raises(UsageError, match=message):
        engine.classify(rows, labels=["spam", "ham"])


def test_missing_values_of_other_libraries_are_missing(engine):
    class NAType:
        def __ne__(self, other):
            raise TypeError("its truth is not known")

        __hash__ = None

    rows = [np.float32("nan"), np.datetime64("NaT"), NAType(), float("nan"), None]
    found = engine.classify(rows, labels=np.array(["spam", "ham"]))
    assert [result.error[:10] for result in found] == ["empty_text"] * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sweep_tokens": "many"}, "max_sweep_tokens is 'many'; it must be of type int"),
        ({"max_sweep_tokens": 10.5}, "max_sweep_tokens is 10.5; it must be of type int"),
        ({"threads": True}, "threads is True; it must be of type int"),
        ({"kv_gib": "1"}, "kv_gib is '1'; it must be of type float"),
        ({"residency": "here"}, "^residency has 'here'"),
    ],
)
def test_settings_are_named_as_python_names_them(settings, message):
    with pytest.raises(UsageError, match=message):
        Engine(DEMO, **settings)


def test_a_model_is_a_path_or_a_name():
    with pytest.raises(UsageError, match="model is None; it must be of type str"):
        Engine(None)


def test_remedies_name_options_of_python(engine):
    (result,) = engine.classify(["The wor"], labels=["ld", "x"], template="{text}", label_prefix="")
    assert "(label_prefix), or accept it with boundary split" in result.error
    with pytest.raises(TaskError, match=r"or normalize vocabulary"):
        engine.classify(["x"], labels=["spam"])
    with pytest.raises(UsageError, match=r"for example output_prefix new_"):
        engine.classify([{"text": "x", "probability": 1}], labels=["spam", "ham"])


def test_threads_take_turns(engine):
    texts = [f"mail number {i}" for i in range(24)]
    expected = [engine.classify([text], labels=["spam", "ham"])[0].probability for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: engine.classify([text], labels=["spam", "ham"])[0].probability, texts))
    assert found == expected


def test_a_closed_engine_says_so():
    engine = Engine(DEMO, threads=1)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.classify(["x"], labels=["spam", "ham"])


def test_every_flag_that_a_remedy_may_name_is_named_as_its_field():
    named = {name: field for field, flag in (ENGINE_FLAGS | TASK_FLAGS).items() for name in flag.names}
    assert {"--hbm-gib", "--prefix"} <= named.keys()
    for name, field in named.items():
        if name.startswith("--") and "/" not in name:
            assert fields_named(f"use {name} 1") == f"use {field} 1"
