"""/v1/completions and /v1/chat/completions as their clients read them, beside the engine's own values."""

import json
from operator import itemgetter

import numpy as np
import openai
import pytest

from moe_prefill.core import AtomicRequest

TEXTS = ["The film was great and I", "A", "Subject: lunch\n\nSee you at noon, Peter", "The film was great and she"]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def rows_of(engine, ids):
    """Log-probabilities after every token of a prompt, float64 [T, vocabulary]."""
    vocab = engine.scoring.limits.vocab_size
    every = np.tile(np.arange(vocab), len(ids))
    offsets = np.arange(len(ids) + 1) * vocab
    request = AtomicRequest(
        np.asarray(ids, np.int32),
        np.arange(len(ids), dtype=np.int32),
        every.astype(np.int32),
        offsets.astype(np.int32),
        True,
    )
    (result,) = engine.scoring.score([request])
    return (result.logits.reshape(len(ids), vocab) - result.log_z[:, None]).astype(np.float64)


def lm_eval_reads(reply, ctxlens):
    """What lm-evaluation-harness makes of a reply: sum of log-probabilities and greediness of each choice."""
    read = []
    for choice, ctxlen in zip(sorted(reply["choices"], key=itemgetter("index")), ctxlens, strict=True):
        values = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        tops = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        read.append((sum(values), greedy))
    return read


def test_lm_eval_reads_the_log_likelihoods_of_token_ids(http, engine):
    contexts = [engine.tokenizer.encode(text).tolist() for text in TEXTS]
    rows = [rows_of(engine, ids) for ids in contexts]
    best = [[int(row[-1].argmax())] for row in rows]
    pairs = [(context, tail) for context, tails in zip(contexts, best, strict=True) for tail in (tails, [17, 40, 300])]
    body = {
        "model": "demo",
        "prompt": [context + tail for context, tail in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    reply = http.post("/v1/completions", json=body).json()
    for choice, (context, tail) in zip(reply["choices"], pairs, strict=True):
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert len(choice["logprobs"][name]) == len(context) + len(tail) + 1
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert None not in choice["logprobs"]["token_logprobs"][1:]
    read = lm_eval_reads(reply, [len(context) for context, _ in pairs])
    for (context, tail), (total, greedy) in zip(pairs, read, strict=True):
        whole = rows_of(engine, context + tail)
        places = range(len(context) - 1, len(context) + len(tail) - 1)
        assert total == pytest.approx(sum(whole[at, token] for at, token in zip(places, tail, strict=True)), abs=1e-3)
        assert greedy == all(whole[at].argmax() == token for at, token in zip(places, tail, strict=True))
    assert [greedy for _, greedy in read[::2]] == [True] * len(TEXTS)


def test_texts_and_their_ids_give_the_same(http, engine):
    ids = [engine.tokenizer.encode(text).tolist() for text in TEXTS]
    options = {"max_tokens": 1, "logprobs": 3, "echo": True}
    one = http.post("/v1/completions", json={"prompt": TEXTS, **options}).json()["choices"]
    other = http.post("/v1/completions", json={"prompt": ids, **options}).json()["choices"]
    for left, right in zip(one, other, strict=True):
        assert left["logprobs"]["tokens"] == right["logprobs"]["tokens"]
        values = [choice["logprobs"]["token_logprobs"][1:] for choice in (left, right)]
        np.testing.assert_allclose(*values, atol=1e-4)
    single = http.post("/v1/completions", json={"prompt": ids[0], **options}).json()["choices"]
    assert len(single) == 1
    assert single[0]["logprobs"]["tokens"] == one[0]["logprobs"]["tokens"]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_arrays_are_as_long_as_what_is_told(client, engine, echo, max_tokens):
    reply = client.completions.create(
        model="demo", prompt=TEXTS[0], max_tokens=max_tokens, logprobs=2, echo=echo, temperature=0
    )
    length = len(engine.tokenizer.encode(TEXTS[0])) * echo + max_tokens
    assert len(reply.choices[0].logprobs.token_logprobs) == length
    assert len(reply.choices[0].logprobs.tokens) == length
    assert reply.choices[0].text.startswith(TEXTS[0]) == echo
    assert reply.usage.completion_tokens == max_tokens
    assert reply.choices[0].finish_reason == "length"


def test_the_generated_token_is_the_most_likely_one(client, engine):
    ids = engine.tokenizer.encode(TEXTS[0]).tolist()
    row = rows_of(engine, ids)[-1]
    reply = client.completions.create(model="demo", prompt=ids, max_tokens=1, logprobs=5)
    logprobs = reply.choices[0].logprobs
    assert logprobs.tokens == [engine.tokenizer.token_string(int(row.argmax()))]
    assert logprobs.token_logprobs[0] == pytest.approx(row.max(), abs=1e-4)
    assert sorted(logprobs.top_logprobs[0].values()) == pytest.approx(np.sort(row)[-5:], abs=1e-4)


def test_prompt_logprobs_are_keyed_by_id_with_ranks(http, engine):
    ids = engine.tokenizer.encode(TEXTS[0]).tolist()
    rows = rows_of(engine, ids)
    body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 3}
    places = http.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    assert places[0] is None
    assert len(places) == len(ids)
    for at, place in enumerate(places[1:]):
        token = str(ids[at + 1])
        assert place[token]["logprob"] == pytest.approx(rows[at, ids[at + 1]], abs=1e-4)
        ranked = sorted((entry for entry in place.values() if entry["rank"]), key=itemgetter("rank"))
        assert [entry["rank"] for entry in ranked] == [1, 2, 3]
        assert ranked[0]["logprob"] == pytest.approx(rows[at].max(), abs=1e-4)


def test_tokens_that_read_alike_are_all_told(http, engine):
    tokenizer = engine.tokenizer
    broken = [token for token in range(600) if tokenizer.token_string(token) == "\ufffd"][:2]
    assert len(broken) == 2, "the demo tokenizer has bytes that are no characters"
    body = {"prompt": [5, 6], "max_tokens": 1, "logprobs": 2, "allowed_token_ids": broken}
    top = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    assert len(top) == 2
    assert any(name.startswith("token_id:") for name in top)


def test_chat_applies_the_models_template(client, engine):
    text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    row = rows_of(engine, engine.tokenizer.encode(text, add_special_tokens=False).tolist())[-1]
    reply = client.chat.completions.create(
        model="demo",
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
        max_completion_tokens=1,
        logprobs=True,
        top_logprobs=4,
    )
    (content,) = reply.choices[0].logprobs.content
    assert content.logprob == pytest.approx(row.max(), abs=1e-4)
    assert [entry.logprob for entry in content.top_logprobs] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-4)
    assert reply.choices[0].message.role == "assistant"
    assert bytes(content.bytes).decode() == content.token


def last_row(engine):
    text = "<|im_start|>user\nYes or no?<|im_end|>\n<|im_start|>assistant\n"
    return rows_of(engine, engine.tokenizer.encode(text, add_special_tokens=False).tolist())[-1]


def ask(client, **extra):
    return client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Yes or no?"}],
        max_tokens=1,
        logprobs=True,
        top_logprobs=5,
        extra_body=extra,
    ).choices[0]


def test_the_token_is_one_of_the_allowed_ones(client, engine):
    allowed = [100, 200, 300]
    choice = ask(client, allowed_token_ids=allowed)
    row = last_row(engine)
    best = max(allowed, key=lambda token: row[token])
    assert choice.message.content == engine.tokenizer.token_string(best)
    told = [entry.logprob for entry in choice.logprobs.content[0].top_logprobs]
    assert told == pytest.approx(sorted(row[allowed], reverse=True), abs=1e-4)


@pytest.mark.parametrize("form", ["guided_choice", "structured_outputs"])
def test_a_structured_choice_of_one_token(client, engine, form):
    words = ["yes", "no"]
    assert all(len(engine.tokenizer.encode_continuation(word)) == 1 for word in words)
    choice = ask(client, **{form: words if form == "guided_choice" else {"choice": words}})
    row = last_row(engine)
    ids = {word: int(engine.tokenizer.encode_continuation(word)[0]) for word in words}
    assert choice.message.content == max(words, key=lambda word: row[ids[word]])
    with pytest.raises(openai.BadRequestError, match="tokens"):
        ask(client, guided_choice=["yes", "absolutely and without any doubt"])


def test_logit_bias_bans_and_forces(client, engine):
    row = last_row(engine)
    order = np.argsort(-row).tolist()
    banned = ask(client, logit_bias={str(token): -100 for token in order[:8]})
    assert banned.message.content == engine.tokenizer.token_string(order[8])
    forced = ask(client, logit_bias={"123": 100})
    assert forced.message.content == engine.tokenizer.token_string(123)
    assert forced.logprobs.content[0].logprob == pytest.approx(row[123], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"max_tokens": None}, "max_tokens_missing"),
        ({"max_tokens": 16}, "max_tokens_too_large"),
        ({"stream": True}, "unsupported"),
        ({"n": 2}, "unsupported"),
        ({"bad_words": ["a"]}, "unsupported"),
        ({"regex": "a|b"}, "unsupported"),
        ({"return_tokens_as_token_ids": True}, "unsupported"),
        ({"prompt": []}, "empty"),
        ({"prompt": ""}, "empty_text"),
        ({"prompt": [[]]}, "empty_text"),
        ({"prompt": [1, "a"]}, "bad_prompt"),
        ({"prompt": [-1]}, "bad_ids"),
        ({"prompt": [10**12]}, "bad_ids"),
        ({"prompt": [True]}, "bad_prompt"),
        ({"prompt": [1] * 5000}, "context_length_exceeded"),
        ({"logprobs": 21}, "bad_logprobs"),
        ({"logprobs": "1"}, "bad_field"),
        ({"allowed_token_ids": [10**6]}, "bad_ids"),
        ({"logit_bias": {"x": 1}}, "bad_ids"),
        ({"logit_bias": {"1": 1e9}}, "bad_bias"),
        ({"truncate_prompt_tokens": 0}, "bad_truncation"),
    ],
)
def test_what_is_refused_says_why(http, change, code):
    body = {"prompt": "a", "max_tokens": 1, **change}
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["code"] == code
    assert error["message"]
    if code == "unsupported":
        ((name, value),) = change.items()
        assert error["message"].startswith(f"{name} is {json.dumps(value)}, which this server does not do")


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="a", max_tokens=1)
    assert next(model.id for model in client.models.list()) == "demo"
    assert client.models.retrieve("demo").id == "demo"


def test_a_prompt_is_cut_only_when_asked(http, engine):
    ids = list(range(50, 60))
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 0, "echo": True, "truncate_prompt_tokens": 3}
    reply = http.post("/v1/completions", json=body).json()
    assert reply["usage"]["prompt_tokens"] == 3
    assert reply["choices"][0]["logprobs"]["tokens"][:3] == [engine.tokenizer.token_string(i) for i in ids[-3:]]


@pytest.mark.parametrize("field", [{"add_generation_prompt": False}, {"continue_final_message": True}, {"tools": [{}]}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/classify"])
def test_the_chat_template_is_not_used_otherwise_in_silence(http, path, field):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert http.post(path, json=body).status_code == 200
    reply = http.post(path, json={**body, **field})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(field)))


@pytest.mark.parametrize("field", [{"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"tools": "x"}}])
def test_a_chat_template_never_comes_from_a_request(http, field):
    body = {"model": "demo", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    reply = http.post("/v1/chat/completions", json={**body, **field})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported")
