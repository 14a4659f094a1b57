"""Classification: probabilities against direct sums, options, and labels that are refused before any work."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from moe_prefill.core import PreparedRow
from moe_prefill.errors import ModelError, RowError, TaskError, UsageError
from moe_prefill.tasks import ClassifyConfig, Label, build_task
from moe_prefill.text import Tokenizer
from tests.tasks.fake_model import LIMITS, WIDE, answer, logprob, run
from tests.text.tokenizers_for_tests import PROMPTED, real

NAMES = ("spam", "not spam at all", "ham")
LABELS = tuple(Label(name=name) for name in NAMES)
ROW = {"text": "the quick brown fox"}
PROMPT = "Classify the text.\nLabels: spam, not spam at all, ham\n\nText: the quick brown fox\n\nLabel:"


def _sums(tokenizer: Tokenizer, prompt: str, labels: tuple[str, ...], end: str = "") -> np.ndarray:
    context = tokenizer.encode(prompt).tolist()
    wholes = [tokenizer.encode(prompt + label + end).tolist() for label in labels]
    return np.array([logprob(context, whole[len(context) :]) for whole in wholes])


@pytest.mark.parametrize("normalize", ["candidates", "vocabulary"])
def test_probabilities_equal_the_direct_sums(small: Tokenizer, normalize: str) -> None:
    task = build_task(ClassifyConfig(labels=LABELS, normalize=normalize), small, LIMITS, ["text"])
    (values,) = run(task, ROW)
    assert isinstance(values, dict)
    expected = np.exp(_sums(small, PROMPT, tuple(" " + name for name in NAMES)))
    if normalize == "candidates":
        expected /= expected.sum()
    assert list(values["probabilities"]) == list(NAMES)
    np.testing.assert_allclose(list(values["probabilities"].values()), expected, rtol=1e-4)
    assert values["predicted_label"] == NAMES[int(expected.argmax())]
    assert values["probability"] == max(values["probabilities"].values())


def test_length_normalisation_counts_what_it_changes(small: Tokenizer) -> None:
    plain = build_task(ClassifyConfig(labels=LABELS), small, LIMITS)
    mean = build_task(ClassifyConfig(labels=LABELS, length_normalize=True), small, LIMITS)
    rows = [{"text": f"a good day {i}"} for i in range(12)]
    changed = 0
    for one, other in zip(plain.prepare(rows), mean.prepare(rows), strict=True):
        assert isinstance(one, PreparedRow)
        assert isinstance(other, PreparedRow)
        results = [answer(request) for request in one.requests]
        before, after = plain.finish(one, results), mean.finish(other, results)
        differs = before["predicted_label"] != after["predicted_label"]
        assert mean.notes(other, results) == (("length_normalisation_changed",) if differs else ())
        assert plain.notes(one, results) == ()
        changed += differs
    assert 0 < changed < len(rows)


def test_of_equal_labels_the_first_wins(small: Tokenizer) -> None:
    task = build_task(ClassifyConfig(labels=(Label(name="yes"), Label(name="no"))), small, LIMITS)
    (prepared,) = task.prepare([ROW])
    assert isinstance(prepared, PreparedRow)
    (request,) = prepared.requests
    result = answer(request)
    result.logits[:] = 1.0
    assert task.finish(prepared, [result])["predicted_label"] == "yes"


def test_single_token_labels_need_no_vocabulary() -> None:
    task = build_task(ClassifyConfig(labels=(Label(name="spam"), Label(name="ham"))), real("gptoss"), WIDE)
    (prepared,) = task.prepare([ROW])
    assert isinstance(prepared, PreparedRow)
    (request,) = prepared.requests
    assert not request.vocabulary
    assert request.positions.tolist() == [len(request.tokens) - 1]


def test_words_and_descriptions(small: Tokenizer) -> None:
    labels = (Label(name="1", word="spam", description="unwanted"), Label(name="0", word="ham"))
    task = build_task(ClassifyConfig(labels=labels), small, LIMITS)
    (prepared,) = task.prepare([ROW])
    assert isinstance(prepared, PreparedRow)
    (preview,) = task.preview(prepared)
    assert "- spam: unwanted\n- ham\n" in small.decode(preview.context)
    assert [name for name, _ in preview.candidates] == ["1", "0"]
    assert small.decode(preview.candidates[0][1]) == " spam"


def test_label_end_closes_labels_that_are_prefixes(small: Tokenizer) -> None:
    labels = (Label(name="not spam"), Label(name="not spam at all"))
    with pytest.raises(TaskError, match=r"'not spam' is a token prefix of label 'not spam at all'.*--label-end"):
        build_task(ClassifyConfig(labels=labels), small, LIMITS)
    prompt = "the quick brown fox\n="
    for end, text in (("\n", "\n"), ("<eos>", "</s>")):
        config = ClassifyConfig(labels=labels, label_end=end, template="{text}\n=", normalize="vocabulary")
        (values,) = run(build_task(config, small, LIMITS), ROW)
        assert isinstance(values, dict)
        expected = np.exp(_sums(small, prompt, (" not spam", " not spam at all"), text))
        np.testing.assert_allclose(list(values["probabilities"].values()), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("spam", "spam"), "'spam' is given twice"),
        (("spam", " "), "label 2 is ' ', which has nothing to score"),
        (("spam", "spam at"), "'spam' is a token prefix of label 'spam at'"),
    ],
)
def test_labels_that_clash_are_refused_before_any_row(small: Tokenizer, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_task(ClassifyConfig(labels=tuple(Label(name=name) for name in labels)), small, LIMITS)


def test_words_that_are_the_same_tokens_are_refused(small: Tokenizer) -> None:
    labels = (Label(name="a", word="spam"), Label(name="b", word="spam"))
    with pytest.raises(TaskError, match="labels 'a' and 'b' are the same tokens"):
        build_task(ClassifyConfig(labels=labels), small, LIMITS)


def test_labels_that_merge_with_some_contexts_are_row_errors(small: Tokenizer) -> None:
    config = ClassifyConfig(labels=(Label(name="am"), Label(name="day")), template="{text}", label_prefix="")
    rows = ({"text": "sp"}, {"text": "to-"})
    first, second = run(build_task(config, small, LIMITS), *rows)
    assert first == "label_boundary"
    assert isinstance(second, dict)
    split = dataclasses.replace(config, boundary="split")
    assert all(isinstance(values, dict) for values in run(build_task(split, small, LIMITS), *rows))


def test_a_tokenizer_with_more_ids_than_its_model(small: Tokenizer) -> None:
    short = dataclasses.replace(LIMITS, vocab_size=small.vocab_size - 1)
    last = small.token_string(small.vocab_size - 1)
    task = build_task(ClassifyConfig(labels=(Label(name="1"), Label(name="2")), template="{text}\n"), small, short)
    good, bad = run(task, {"text": "a day"}, {"text": f"{last}{last}"})
    assert isinstance(good, dict)
    assert bad == "bad_ids"


def test_table_errors_come_before_any_row(small: Tokenizer) -> None:
    with pytest.raises(TaskError, match=r"no column 'text'; it has id, body, and this task's own \{labels\}"):
        build_task(ClassifyConfig(labels=LABELS), small, LIMITS, ["id", "body"])
    with pytest.raises(UsageError, match="output column 'probability' already"):
        build_task(ClassifyConfig(labels=LABELS), small, LIMITS, ["text", "probability"])
    task = build_task(ClassifyConfig(labels=LABELS, output_prefix="my_"), small, LIMITS, ["text", "probability"])
    assert [column.name for column in task.columns] == ["my_predicted_label", "my_probability", "my_probabilities"]
    assert task.placeholders == {"text"}
    assert task.answer_column == "my_predicted_label"


def test_a_bad_row_leaves_its_neighbours_alone(small: Tokenizer) -> None:
    task = build_task(ClassifyConfig(labels=LABELS), small, LIMITS)
    good = run(task, ROW)
    bad = [
        {"text": None},
        {"text": " \n"},
        {"text": float("nan")},
        {"text": "word " * 500},
        {"text": "x\ud800"},
        {"text": b"\xff"},
    ]
    mixed = run(task, bad[0], ROW, *bad[1:])
    assert mixed[1] == good[0]
    assert [value for value in mixed if isinstance(value, str)] == [
        "empty_text",
        "empty_text",
        "empty_text",
        "too_long",
        "bad_text",
        "bad_text",
    ]


def test_too_long_says_numbers_and_remedy(small: Tokenizer) -> None:
    task = build_task(ClassifyConfig(labels=LABELS), small, LIMITS)
    (error,) = task.prepare([{"text": "the " * 300}])
    assert isinstance(error, RowError)
    assert "longest request is 200" in str(error)
    assert "(truncate: left, right or middle)" in str(error)


def test_many_labels_do_not_multiply_the_memory_of_texts(small: Tokenizer) -> None:
    """A context is held once, not once for each label; so are prompts that are too long, whose requests nobody asks."""
    labels = tuple(Label(name=f"n{i}", word=f"{i} dog") for i in range(300))
    task = build_task(ClassifyConfig(labels=labels, template="{text}. Answer:"), small, LIMITS)
    rows = [{"text": f"{i} " + "the quick brown fox " * 200} for i in range(30)]
    tracemalloc.start()
    try:
        errors = task.prepare(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {error.code for error in errors if isinstance(error, RowError)} == {"too_long"}
    assert peak < 12_000_000 < len(rows) * len(labels) * len(rows[0]["text"]), peak


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_truncation_cuts_the_text_and_not_the_template(small: Tokenizer, side: str) -> None:
    task = build_task(ClassifyConfig(labels=LABELS, truncate=side), small, LIMITS)
    words = [f"day{i}" for i in range(150)]
    (prepared,) = task.prepare([{"text": " ".join(words)}])
    assert isinstance(prepared, PreparedRow)
    assert prepared.notes == ("truncated",)
    longest = max(len(request.tokens) for request in prepared.requests)
    assert LIMITS.max_request_tokens - 4 <= longest <= LIMITS.max_request_tokens
    text = small.decode(task.preview(prepared)[0].context)
    head, tail = PROMPT.split("the quick brown fox")
    assert text.startswith("<s>" + head)
    assert text.endswith(tail)
    assert ("day0 day1 " in text) == (side != "left")
    assert ("day148 day149" in text) == (side != "right")


def test_chat_ends_with_the_generation_prompt_and_labels_follow_directly(small: Tokenizer) -> None:
    config = ClassifyConfig(labels=LABELS, chat=True, system="You judge mails.")
    task = build_task(config, small, LIMITS)
    (prepared,) = task.prepare([ROW])
    assert isinstance(prepared, PreparedRow)
    (preview,) = task.preview(prepared)
    text = small.decode(preview.context)
    assert text.startswith("<s><|end|>system\nYou judge mails.<|end|>user\nClassify the text.")
    assert text.endswith("Reply with the label only.<|end|>assistant\n")
    assert [small.decode(ids) for _, ids in preview.candidates] == list(NAMES)


def test_chat_needs_a_template_and_a_system_prompt_needs_chat() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        build_task(ClassifyConfig(labels=LABELS, chat=True), real("gptoss"), WIDE)
    with pytest.raises(TaskError, match="system prompt needs the chat template"):
        ClassifyConfig(labels=LABELS, system="x")


def test_the_label_prefix_follows_the_template(small: Tokenizer) -> None:
    expected = {"{text} Label:": " spam", "{text} Label:\n": "spam"}
    for template, text in expected.items():
        task = build_task(ClassifyConfig(labels=LABELS, template=template), small, LIMITS)
        (prepared,) = task.prepare([ROW])
        assert isinstance(prepared, PreparedRow)
        assert small.decode(task.preview(prepared)[0].candidates[0][1]) == text


def test_digest_names_what_changes_answers(small: Tokenizer) -> None:
    base = ClassifyConfig(labels=LABELS)
    others = [
        ClassifyConfig(labels=LABELS[::-1]),
        ClassifyConfig(labels=LABELS, template="{text} Label:"),
        ClassifyConfig(labels=LABELS, length_normalize=True),
        ClassifyConfig(labels=LABELS, truncate="left"),
        ClassifyConfig(labels=LABELS, chat=True),
    ]
    digests = {build_task(config, small, LIMITS).digest for config in (base, *others)}
    assert len(digests) == len(others) + 1
    assert build_task(base, small, LIMITS).digest == build_task(base, small, LIMITS, ["text"]).digest


@pytest.mark.parametrize(("name", "chat"), PROMPTED)
def test_with_published_tokenizers(name: str, chat: bool) -> None:
    tokenizer = real(name)
    task = build_task(ClassifyConfig(labels=LABELS, chat=chat), tokenizer, WIDE)
    rows = [{"text": text} for text in ("Win 1000$!!", "日本語のメール", "ends with space ", "👍🏽")]
    for prepared in task.prepare(rows):
        assert isinstance(prepared, PreparedRow), prepared
        (preview,) = task.preview(prepared)
        text = tokenizer.decode(preview.context)
        for label, (_, ids) in zip(NAMES, preview.candidates, strict=True):
            prefix = "" if chat else " "
            assert tokenizer.decode([*preview.context.tolist(), *ids]) == text + prefix + label
