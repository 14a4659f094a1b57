"""Task files: every config can be written, and what is wrong in one is named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from moe_prefill.errors import TaskError
from moe_prefill.tasks import (
    ChooseConfig,
    ClassifyConfig,
    Label,
    RankConfig,
    ScoreConfig,
    SelectConfig,
    TaskConfig,
    config_from_mapping,
    load_task_file,
    read_task_file,
)

FILES: dict[str, TaskConfig] = {
    """
    task = "classify"
    template = "{subject}: {body}\\nIs it spam?"
    labels = ["yes", "no"]
    normalize = "vocabulary"
    length_normalize = true
    label_end = "<eos>"
    """: ClassifyConfig(
        template="{subject}: {body}\nIs it spam?",
        labels=(Label(name="yes"), Label(name="no")),
        normalize="vocabulary",
        length_normalize=True,
        label_end="<eos>",
    ),
    """
    task = "classify"
    chat = true
    system = "You judge mails."
    [[labels]]
    name = "spam"
    word = "junk"
    description = "unwanted"
    [[labels]]
    name = "ham"
    """: ClassifyConfig(
        chat=True,
        system="You judge mails.",
        labels=(Label(name="spam", word="junk", description="unwanted"), Label(name="ham")),
    ),
    'task = "choose"\noption_columns = ["a", "b"]\nidentifiers = "digits"\nboundary = "split"': ChooseConfig(
        option_columns=("a", "b"), identifiers="digits", boundary="split"
    ),
    'task = "select"\ncandidates = ["x", "y"]\nthreshold = 1': SelectConfig(candidates=("x", "y"), threshold=1.0),
    'task = "rank"\ncandidates_column = "docs"\ntop_n = 3\ntruncate = "middle"': RankConfig(
        candidates_column="docs", top_n=3, truncate="middle"
    ),
    'task = "score"\ntemplate = "{q}"\ncontinuation = " {a}"\ntop_k = 5': ScoreConfig(
        template="{q}", continuation=" {a}", top_k=5
    ),
}


@pytest.mark.parametrize(("text", "config"), FILES.items())
def test_files_give_their_configs(tmp_path: Path, text: str, config: TaskConfig) -> None:
    path = tmp_path / "task.toml"
    path.write_text(text)
    assert load_task_file(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels = ['a']", "does not say which task"),
        ("task = 'judge'", "unknown task 'judge'; it is one of classify"),
        ("task = 'clasify'", r"unknown task 'clasify' \(did you mean 'classify'\?\)"),
        ("task = 'classify'\nlabel = ['a', 'b']", r"has no key 'label' \(did you mean 'labels'\?\)"),
        ("task = 'classify'", "classify needs labels"),
        ("task = 'classify'\nlabels = ['a']\ntreshold = 1", "classify has no key 'treshold'.*; it has boundary, chat"),
        ("task = 'classify'\nlabels = 'a'", "labels is 'a'; it is a list"),
        ("task = 'classify'\nlabels = [1]", r"labels\[0\] is 1; a label is a text or a table"),
        ("task = 'classify'\nlabels = [{word = 'a'}]", "a label needs a name"),
        ("task = 'classify'\nlabels = [{name = 'a', w = 'b'}]", "a label has no key 'w'"),
        ("task = 'classify'\nlabels = ['a']\nchat = 'yes'", "chat is 'yes'; it is of type bool"),
        ("task = 'classify'\nlabels = []", "classify needs labels"),
        ("task = 'classify'\nlabels = ['a']\ntruncate = 'top'", "truncate is 'top'; it is one of error, left"),
        ("task = 'rank'\ncandidates = ['a']\ntop_n = true", "top_n is True; it is of type int"),
        ("task = 'classify", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.toml"
    path.write_text(text)
    with pytest.raises(TaskError, match=message):
        load_task_file(path)


@pytest.mark.parametrize("name", ["labels", "template", "system"])
def test_bytes_of_another_encoding_are_refused(name: str) -> None:
    """As a command line in Latin-1 hands them over."""
    broken = b"caf\xe9 {text}".decode("utf-8", "surrogateescape")
    values = {"labels": ["a", "b"], "chat": True, name: [broken, "b"] if name == "labels" else broken}
    with pytest.raises(TaskError, match=rf"{name}.* which is no UTF-8"):
        config_from_mapping("classify", values)


def test_numbers_of_numpy_are_numbers() -> None:
    values = {"candidates": np.array(["a", "b"]), "threshold": np.float32(0.5), "chat": np.bool_(True)}
    assert config_from_mapping("select", values) == SelectConfig(candidates=("a", "b"), threshold=0.5, chat=True)
    assert config_from_mapping("score", {"top_k": np.int64(3)}) == ScoreConfig(top_k=3)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_text("task = 'rank'\ncandidates = ['a']", encoding="utf-8-sig")
    assert load_task_file(path) == RankConfig(candidates=("a",))


def test_flags_may_override_a_file(tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_text("task = 'select'\ncandidates = ['a']\nthreshold = 0.5")
    kind, values = read_task_file(path)
    config = config_from_mapping(kind, {**values, "threshold": 0.9})
    assert config == SelectConfig(candidates=("a",), threshold=0.9)
    with pytest.raises(TaskError, match="cannot be read"):
        read_task_file(tmp_path / "missing.toml")


def test_the_guides_examples_are_valid() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    examples = re.findall(r"```toml\n(.*?)```", guide, flags=re.DOTALL)
    assert len(examples) >= 3
    for text in examples:
        values = tomllib.loads(text)
        config_from_mapping(values.pop("task"), values)
