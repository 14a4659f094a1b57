"""Every scoring endpoint beside what ``Engine`` answers in this process."""

import httpx
import numpy as np
import pytest

from moe_prefill.core import AtomicRequest
from moe_prefill.tasks import RankConfig, load_task_file

from .conftest import ROOT
from .helpers import FakeEngine, listening

QUERY = "Is this mail wanted?"
DOCUMENTS = ["Subject: lunch at noon", "You won a prize, click here", "The minutes of our meeting"]
LABELS = [100, 101, 102]


def post(http, path, body):
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.fixture(scope="module")
def relevance(engine):
    (ranking,) = engine.rank(
        [{"query": QUERY, "documents": DOCUMENTS}], text_column="query", candidates_column="documents"
    )
    return dict(zip(ranking.indices, ranking.scores, strict=True))


def label_scores(engine, ids, *, softmax):
    (result,) = engine.scoring.score([AtomicRequest.candidates(ids, LABELS, vocabulary=True)])
    values = result.logits.astype(np.float64)
    return np.exp(values - (np.logaddexp.reduce(values) if softmax else result.log_z[0]))


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_as_vllm_cohere_and_jina(http, relevance, path):
    told = post(http, path, {"model": "demo", "query": QUERY, "documents": DOCUMENTS, "top_n": 2})
    assert len(told["results"]) == 2
    scores = [entry["relevance_score"] for entry in told["results"]]
    assert scores == sorted(scores, reverse=True)
    for entry in told["results"]:
        assert entry["relevance_score"] == pytest.approx(relevance[entry["index"]], rel=1e-4)
        assert entry["document"]["text"] == DOCUMENTS[entry["index"]]
    assert told["usage"]["total_tokens"] > 0
    assert set(told) >= {"id", "model", "meta"}


def test_rerank_takes_objects_and_leaves_documents_out(http, relevance):
    documents = [{"text": DOCUMENTS[0]}, {"content": [{"type": "text", "text": DOCUMENTS[1]}]}, DOCUMENTS[2]]
    told = post(http, "/rerank", {"query": QUERY, "documents": documents, "return_documents": False})
    assert {entry["index"]: pytest.approx(entry["relevance_score"], rel=1e-4) for entry in told["results"]} == relevance
    assert all("document" not in entry for entry in told["results"])


def test_rerank_as_sglang_is_a_bare_list_where_the_operator_says_so(make_service):
    body = {"query": QUERY, "documents": DOCUMENTS}
    with listening(make_service(facts={"v1_rerank": "sglang"})) as url, httpx.Client(base_url=url) as http:
        told = post(http, "/v1/rerank", body)
        results = post(http, "/v2/rerank", body)["results"]
        short = post(http, "/v1/rerank", {**body, "top_n": 1, "return_documents": False})
    assert [(one["index"], one["score"]) for one in told] == [(r["index"], r["relevance_score"]) for r in results]
    assert [one["document"] for one in told] == [DOCUMENTS[one["index"]] for one in told]
    assert all(one["meta_info"]["prompt_tokens"] > 0 for one in told)
    assert [(one["index"], one["document"]) for one in short] == [(told[0]["index"], None)]


def test_an_instruction_fills_the_tasks_prompt_or_is_refused(make_service, tokenizer):
    config = RankConfig(
        candidates_column="documents", text_column="query", template="{instruct}: {query}\n{candidate}\n"
    )
    body, asked = {"query": QUERY, "documents": DOCUMENTS}, {"instruct": "Find mails"}
    pairs = {"text_1": QUERY, "text_2": DOCUMENTS}
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    with listening(make_service(engine, facts={"rerank": config})) as url, httpx.Client(base_url=url) as http:
        assert isinstance(post(http, "/v1/rerank", {**body, **asked}), list)
        seen = [tokenizer.decode(request.tokens) for call in engine.calls for request in call]
        assert all(text.lstrip().startswith(f"Find mails: {QUERY}") for text in seen)
        assert len(post(http, "/v1/score", {**pairs, "instruction": "Find mails"})["data"]) == len(DOCUMENTS)
        assert http.post("/rerank", json=body).json()["error"]["code"] == "bad_instruct", "it reads one"
        assert http.post("/score", json={**pairs, "instruction": 1}).status_code == 400
    with listening(make_service()) as url:
        refused = httpx.post(f"{url}/v1/rerank", json={**body, **asked})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_instruct")


def test_rerank_as_tei(http, relevance):
    told = post(http, "/rerank", {"query": QUERY, "texts": DOCUMENTS, "return_text": True})
    assert {entry["index"]: pytest.approx(entry["score"], rel=1e-4) for entry in told} == relevance
    assert told[0]["text"] == DOCUMENTS[told[0]["index"]]
    raw = post(http, "/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True})
    for entry in raw:
        chance = relevance[entry["index"]]
        assert entry["score"] == pytest.approx(np.log(chance / (1 - chance)), abs=1e-3)


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_score_of_pairs_as_vllm(http, relevance, names):
    for path in ("/score", "/v1/score"):
        told = post(http, path, {names[0]: QUERY, names[1]: DOCUMENTS})
        assert [entry["score"] for entry in told["data"]] == pytest.approx(
            [relevance[index] for index in range(3)], rel=1e-4
        )
    pairs = post(http, "/score", {names[0]: [QUERY] * 3, names[1]: DOCUMENTS})
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx([relevance[i] for i in range(3)], rel=1e-4)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("item_first", [False, True])
def test_score_as_sglang_returns_every_label(http, engine, softmax, item_first):
    options = {"label_token_ids": LABELS, "apply_softmax": softmax, "item_first": item_first}
    told = post(http, "/v1/score", {"query": QUERY, "items": DOCUMENTS, **options})
    for row, document in zip(told["scores"], DOCUMENTS, strict=True):
        text = document + QUERY if item_first else QUERY + document
        want = label_scores(engine, engine.tokenizer.encode(text), softmax=softmax)
        np.testing.assert_allclose(row, want, rtol=1e-3)
    query = engine.tokenizer.encode(QUERY).tolist()
    items = [engine.tokenizer.encode(text).tolist() for text in DOCUMENTS]
    by_ids = post(http, "/v1/score", {"query": query, "items": items, **options})
    for row, item in zip(by_ids["scores"], items, strict=True):
        want = label_scores(engine, item + query if item_first else query + item, softmax=softmax)
        np.testing.assert_allclose(row, want, rtol=1e-3)


def test_generative_scoring_tells_the_first_label(http, engine):
    told = post(http, "/generative_scoring", {"query": QUERY, "items": DOCUMENTS, "label_token_ids": LABELS})
    query = engine.tokenizer.encode(QUERY).tolist()
    for entry, text in zip(told["data"], DOCUMENTS, strict=True):
        ids = query + engine.tokenizer.encode(text, add_special_tokens=False).tolist()
        assert entry["score"] == pytest.approx(label_scores(engine, ids, softmax=True)[0], rel=1e-3)
    assert told["object"] == "list"


@pytest.fixture(scope="module")
def spam(engine):
    config = load_task_file(ROOT / "examples/demo_model/spam.toml")
    return engine.classify(DOCUMENTS, labels=list(config.labels), template=config.template)


def test_classify_as_vllm_with_the_servers_classes(http, spam):
    for path in ("/classify", "/v1/classify"):
        told = post(http, path, {"input": DOCUMENTS})
        for entry, want in zip(told["data"], spam, strict=True):
            assert entry["label"] == want.label
            assert entry["probs"] == pytest.approx(list(want.probabilities.values()), rel=1e-4)
            assert entry["num_classes"] == 2


def test_classify_of_ids_takes_them_as_they_are(http, engine, spam):
    template = load_task_file(ROOT / "examples/demo_model/spam.toml").template
    ids = [engine.tokenizer.encode(template.format(text=text)).tolist() for text in DOCUMENTS]
    told = post(http, "/classify", {"input": ids})
    for entry, want in zip(told["data"], spam, strict=True):
        assert entry["probs"] == pytest.approx(list(want.probabilities.values()), rel=1e-4)


def test_classify_as_infinity_and_predict_as_tei(http, spam):
    told = post(http, "/classify", {"input": DOCUMENTS, "raw_scores": False})
    predicted = post(http, "/predict", {"inputs": [[text] for text in DOCUMENTS]})
    assert told["object"] == "classify"
    for rows in (told["data"], predicted):
        for row, want in zip(rows, spam, strict=True):
            assert {entry["label"]: pytest.approx(entry["score"], rel=1e-4) for entry in row} == want.probabilities
            assert row[0]["label"] == want.label
    single = post(http, "/predict", {"inputs": DOCUMENTS[0]})
    assert single[0]["label"] == spam[0].label


def test_own_classify_equals_the_engine(http, engine):
    options = {"labels": ["spam", {"name": "ham", "description": "wanted mail"}], "chat": True, "system": "Be strict."}
    told = post(http, "/v1/classify", {"rows": DOCUMENTS, **options})
    for entry, want in zip(told["data"], engine.classify(DOCUMENTS, **options), strict=True):
        assert entry["predicted_label"] == want.label
        assert entry["probabilities"] == pytest.approx(want.probabilities, rel=1e-4)


def test_a_bad_row_leaves_its_neighbours_alone(http):
    told = post(http, "/v1/classify", {"rows": ["fine", "", "fine too"], "labels": ["spam", "ham"]})
    assert [("error" in entry) for entry in told["data"]] == [False, True, False]
    assert told["data"][1]["error"]["code"] == "empty_text"


def test_own_choose_select_and_rank_equal_the_engine(http, engine):
    rows = [{"text": "What is wet?", "candidates": DOCUMENTS}]
    (chosen,) = engine.choose(rows, options=["Water", "Fire"])
    (entry,) = post(http, "/v1/choose", {"rows": rows, "options": ["Water", "Fire"]})["data"]
    assert (entry["choice"], entry["choice_index"], entry["choice_text"]) == (
        chosen.identifier,
        chosen.index,
        chosen.text,
    )
    assert entry["probabilities"] == pytest.approx(chosen.probabilities, rel=1e-4)
    (selected,) = engine.select(rows, candidates_column="candidates", threshold=0.4)
    (entry,) = post(http, "/v1/select", {"rows": rows, "candidates_column": "candidates", "threshold": 0.4})["data"]
    assert entry["selected"] == selected.selected
    assert entry["probabilities"] == pytest.approx(selected.probabilities, rel=1e-4)
    (ranked,) = engine.rank(rows, candidates_column="candidates", top_n=2)
    (entry,) = post(http, "/v1/rank", {"rows": rows, "candidates_column": "candidates", "top_n": 2})["data"]
    assert entry["ranking_indices"] == ranked.indices
    assert entry["ranking_scores"] == pytest.approx(ranked.scores, rel=1e-4)


def test_own_score_tokens_equals_the_engine_for_texts_and_ids(http, engine):
    rows = [{"q": "2 + 2 =", "a": " 4"}]
    options = {"template": "{q}", "continuation": "{a}", "top_k": 2}
    (want,) = engine.score(rows, **options)
    (entry,) = post(http, "/v1/score_tokens", {"rows": rows, **options})["data"]
    assert entry["logprob"] == pytest.approx(want.logprob, abs=1e-3)
    assert entry["tokens"] == list(want.tokens)
    rows = [{"ids": [5, 6, 7, 8], "at": [1, 3], "of": [[10, 11], [12]]}]
    options = {"token_ids_column": "ids", "positions_column": "at", "candidate_ids_column": "of"}
    (want,) = engine.score(rows, **options)
    (entry,) = post(http, "/v1/score_tokens", {"rows": rows, **options})["data"]
    for told, known in zip(entry["candidate_logprobs"], want.candidate_logprobs, strict=True):
        assert told == pytest.approx(known, abs=1e-3)


def test_tokenize_and_back_as_lm_eval_probes_them(http, engine):
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    assert "im_start" in info["chat_template"]
    told = post(http, "/tokenize", {"prompt": "Hello there", "add_special_tokens": False})
    assert told["tokens"] == engine.tokenizer.encode("Hello there", add_special_tokens=False).tolist()
    assert post(http, "/detokenize", {"tokens": told["tokens"]})["prompt"] == "Hello there"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/score", {"query": "a", "items": [], "label_token_ids": [1]}, 400),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": []}, 400),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [10**9]}, 400),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 400),
        ("/score", {"text_1": "a"}, 400),
        ("/rerank", {"query": "a", "documents": []}, 400),
        ("/rerank", {"query": "a", "documents": ["b"] * 3000}, 422),
        ("/rerank", {"query": "a", "documents": ["word " * 9000]}, 400),
        ("/rerank", {"query": "a", "texts": ["word " * 9000]}, 422),
        ("/rerank", {"query": "", "texts": ["b"]}, 400),
        ("/predict", {"inputs": [1]}, 422),
        ("/v1/classify", {"rows": ["a"]}, 400),
        ("/v1/classify", {"rows": ["a"], "labels": ["a", "a"]}, 400),
        ("/v1/classify", {"rows": [{"other": "a"}], "labels": ["a", "b"]}, 400),
        ("/v1/classify", {"rows": ["a"], "labels": ["a", "b"], "lables": 1}, 400),
        ("/v1/rank", {"rows": ["a"], "candidates": ["b"], "output_prefix": "x"}, 400),
    ],
)
def test_what_is_refused_says_why(http, path, body, status):
    reply = http.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error if isinstance(error, str) else error["message"]
    assert len(reply.text) < 1000


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"documents": ["a", 5]}, "documents.1", "documents.1: "),
        ({"documents": ["word " * 9000]}, None, "truncate"),
        ({"documents": [{"title": "a", "text": "b"}], "rank_fields": ["title"]}, "rank_fields", "rank_fields"),
    ],
)
def test_a_refusal_speaks_of_the_body(http, body, param, told):
    error = http.post("/rerank", json={"query": "a", **body}).json()["error"]
    assert error["param"] == param
    assert told in error["message"]
    assert "--" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/score", {"text_1": "", "text_2": ["a"]}, "text_1"),
        ("/score", {"queries": ["a", " "], "documents": ["b", "c"]}, "queries"),
        ("/score", {"queries": ["a", "b"], "documents": ["c"]}, "queries"),
        ("/rerank", {"query": " ", "documents": ["a"]}, "query"),
    ],
)
def test_a_query_that_is_refused_has_the_name_that_the_client_gave_it(http, path, body, param):
    reply = http.post(path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)


def test_long_documents_are_cut_when_asked(make_service, tokenizer):
    service = make_service(FakeEngine(max_request=100, vocab_size=tokenizer.vocab_size))
    long = "word " * 900
    with listening(service) as base, httpx.Client(base_url=base) as http:
        assert http.post("/rerank", json={"query": "a", "documents": [long]}).status_code == 400
        body = {"query": "a", "documents": [long, "b"], "truncate_prompt_tokens": -1}
        assert len(post(http, "/rerank", body)["results"]) == 2
        for side in ("left", "Right"):
            body = {"query": "a", "texts": [long], "truncate": True, "truncation_direction": side}
            assert len(post(http, "/rerank", body)) == 1
        capped = post(http, "/v2/rerank", {"query": "a", "documents": [long], "max_tokens_per_doc": 5})
    assert max(len(request.tokens) for call in service.scheduler.engine.calls for request in call) == 100
    assert capped["results"][0]["document"]["text"] == "word " * 4 + "word"
