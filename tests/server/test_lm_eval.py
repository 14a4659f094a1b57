"""lm-evaluation-harness's own client of this server beside its own transformers model on the same checkpoint."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from .conftest import MODEL

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
