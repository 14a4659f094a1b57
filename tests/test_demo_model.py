"""The bundled model through the whole system, beside transformers' own generation, row by row (paper section 8.6)."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from moe_prefill import Engine
from moe_prefill.core import AtomicRequest
from moe_prefill.tasks import load_task_file

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/demo_model/checkpoint"
ROWS = 48


@pytest.fixture(scope="module")
def engine():
    with Engine(MODEL, dtype="float32", threads=1) as built:
        yield built


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def mails():
    with (ROOT / "examples/data/mails.csv").open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))[:ROWS]


# Sentences written for this test: the reviews that the model was trained on may not be shipped.
REVIEWS = [
    f"{opening} {middle} {end}"
    for opening in ("This film was", "I found the story", "The acting is", "As a comedy it is")
    for middle in ("wonderful and moving,", "dull and far too long,", "a complete waste of time,", "a delight,")
    for end in ("and the ending is perfect.", "and I nearly fell asleep.", "with a great cast.")
]


def greedy(reference, tokens) -> int:
    ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
    out = reference.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    return int(out[0, -1])


def check_agreement(engine, reference, rows, taskfile):
    config = load_task_file(ROOT / "examples/demo_model" / taskfile)
    answers = engine.classify(rows, labels=list(config.labels), template=config.template)
    assert all(answer.error is None for answer in answers)
    for row, answer in zip(rows, answers, strict=True):
        prompt = config.template.format(**row)
        assert engine.tokenizer.decode([greedy(reference, engine.tokenizer.encode(prompt))]).strip() == answer.label
    return answers


def test_mails_agree_with_greedy_generation(engine, reference, mails):
    answers = check_agreement(engine, reference, mails, "spam.toml")
    right = np.mean([answer.label == row["label"] for answer, row in zip(answers, mails, strict=True)])
    assert right >= 0.9


def test_reviews_agree_with_greedy_generation(engine, reference):
    answers = check_agreement(engine, reference, [{"text": text} for text in REVIEWS], "sentiment.toml")
    assert {answer.label for answer in answers} == {"positive", "negative"}


def test_logits_equal_transformers_on_real_text(engine, reference, mails):
    prompts = [engine.tokenizer.encode(f"Mail:\n{row['text']}") for row in mails[:12]]
    vocab = engine.scoring.limits.vocab_size
    results = engine.scoring.score([AtomicRequest.candidates(p, np.arange(vocab)) for p in prompts])
    for tokens, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            want = reference(torch.as_tensor(tokens).long()[None], logits_to_keep=1).logits[0, -1].numpy()
        assert np.abs(result.logits - want).max() <= 1e-4 * np.abs(want).max()


def test_multi_token_labels_sum_the_references_log_probabilities(engine, reference):
    labels = ["spam mail", "ham", "something else entirely"]
    (answer,) = engine.classify(["Subject: lunch\n\nSee you at noon"], labels=labels, template="{text}\nLabel:")
    context = engine.tokenizer.encode("Subject: lunch\n\nSee you at noon\nLabel:")
    scores = []
    for label in labels:
        full = engine.tokenizer.encode(f"Subject: lunch\n\nSee you at noon\nLabel: {label}")
        assert full[: len(context)].tolist() == context.tolist()
        with torch.inference_mode():
            logprobs = reference(torch.as_tensor(full).long()[None]).logits[0].log_softmax(-1)
        scores.append(sum(float(logprobs[i - 1, full[i]]) for i in range(len(context), len(full))))
    want = np.exp(scores - np.logaddexp.reduce(scores))
    np.testing.assert_allclose([answer.probabilities[label] for label in labels], want, rtol=1e-3)


def test_one_bad_row_leaves_its_neighbours_alone(engine):
    texts = ["Subject: a\n\nfree prize", "", "Subject: b\n\nminutes of the meeting"]
    answers = engine.classify(texts, labels=["spam", "ham"])
    assert answers[0].error is None
    assert answers[1].error is not None
    assert answers[1].error.startswith("empty_text")
    assert answers[2].error is None


def test_the_command_and_python_give_the_same_answers(engine, mails, tmp_path):
    import subprocess

    out = tmp_path / "out.csv"
    source = ROOT / "examples/data/mails.csv"
    command = [sys.executable, "-m", "moe_prefill.cli", "classify", str(source), "--limit", "12", "--quiet"]
    command += ["--task", str(ROOT / "examples/demo_model/spam.toml"), "--model", str(MODEL), "--dtype", "float32"]
    subprocess.run([*command, "-o", str(out)], check=True)
    with out.open(newline="", encoding="utf-8") as lines:
        written = list(csv.DictReader(lines))
    config = load_task_file(ROOT / "examples/demo_model/spam.toml")
    answers = engine.classify(mails[:12], labels=list(config.labels), template=config.template)
    for row, answer in zip(written, answers, strict=True):
        assert row["predicted_label"] == answer.label
        assert float(row["probability"]) == pytest.approx(answer.probability, rel=1e-4)
