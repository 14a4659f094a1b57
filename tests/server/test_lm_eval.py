"""lm-evaluation-harness's own client of this server beside its own transformers model on the same checkpoint."""

import csv
import json

import pytest
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.sglang_generate_API import SGLANGGENERATEAPI

from .conftest import MODEL, ROOT

MAILS = [
    "Subject: You won!\n\nClaim your prize now",
    "Subject: lunch\n\nSee you at noon",
    "Hi, the minutes are attached",
]
CHOICES = [" spam", " ham", " neither of the two"]
PAIRS = [
    (f"Mail:\n{mail}\n\nQuestion: Is this mail spam or ham?\nAnswer:", choice) for mail in MAILS for choice in CHOICES
]


@pytest.fixture(scope="module")
def reference():
    return HFLM(pretrained=str(MODEL), device="cpu", dtype="float32", batch_size=4)


def asked():
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index, metadata=("task", index, 1))
        for index, pair in enumerate(PAIRS)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer": str(MODEL), "tokenized_requests": True, "batch_size": 4},
        {"tokenizer": str(MODEL), "tokenized_requests": False},
        {"tokenizer_backend": "remote", "batch_size": 4},
    ],
    ids=["ids", "texts", "remote tokenizer"],
)
def test_log_likelihoods_are_those_of_its_own_model(url, reference, settings):
    client = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="demo", **settings)
    told = client.loglikelihood(asked(), disable_tqdm=True)
    known = reference.loglikelihood(asked(), disable_tqdm=True)
    for (value, greedy), (want, want_greedy) in zip(told, known, strict=True):
        assert value == pytest.approx(want, abs=1e-3)
        assert greedy == want_greedy
    assert any(greedy for _, greedy in told)


def test_its_client_of_sglang_reads_the_same_log_likelihoods(url, reference):
    """Its greediness is not compared: it says that a choice is greedy where no token of it is."""
    client = SGLANGGENERATEAPI(base_url=f"{url}/generate", model="demo", tokenizer=str(MODEL), batch_size=4)
    told = client.loglikelihood(asked(), disable_tqdm=True)
    known = reference.loglikelihood(asked(), disable_tqdm=True)
    assert [value for value, _ in told] == pytest.approx([value for value, _ in known], abs=1e-3)


def test_a_multiple_choice_task_has_the_same_accuracy(url, reference, tmp_path):
    with (ROOT / "examples/data/mails.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if len(row["text"]) < 600][:16]
    docs = [{"mail": row["text"], "answer": ["spam", "ham"].index(row["label"])} for row in rows]
    (tmp_path / "mails.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = ConfigurableTask(
        config={
            "task": "mails",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "mails.jsonl")}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Mail:\n{{mail}}\n\nQuestion: Is this mail spam or ham?\nAnswer:",
            "doc_to_choice": ["spam", "ham"],
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    client = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="demo", tokenizer=str(MODEL), batch_size=4)
    told, known = (evaluate(lm, {"mails": task}, log_samples=True, bootstrap_iters=0) for lm in (client, reference))
    assert told["results"]["mails"]["acc,none"] > 0.6, "the demo model knows its mails"
    assert told["results"]["mails"]["acc,none"] == known["results"]["mails"]["acc,none"]
    assert told["results"]["mails"]["acc_norm,none"] == known["results"]["mails"]["acc_norm,none"]
    for mine, other in zip(told["samples"]["mails"], known["samples"]["mails"], strict=True):
        for (value, _), (want, _) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
            assert value == pytest.approx(want, abs=1e-3)
