"""Every question that can be asked: its paths, its bodies, and the function that plans it. HTTP and batches read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel

from . import classifying, completions, generating, own, reranking, scoring, tokens
from .context import Context, Plan
from .refusals import bad_request

Dialect = Literal["openai", "tei"]
_Planner = Callable[[Context, dict[str, Any]], Plan]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form of a body: how it is planned, documented and how its errors look. ``keys`` tell it from other forms
    of the same endpoint: a body that has any of them is of this form.
    """

    body: type[BaseModel]
    plan: _Planner
    example: Mapping[str, Any]
    keys: frozenset[str] = frozenset()
    dialect: Dialect = "openai"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A question with its forms; of a body that no form's keys fit, the last is taken."""

    paths: tuple[str, ...]
    summary: str
    forms: tuple[Form, ...]

    def form_of(self, raw: Mapping[str, Any]) -> Form:
        return next((form for form in self.forms[:-1] if form.keys & set(raw)), self.forms[-1])

    def plan(self, context: Context, raw: object) -> Plan:
        """Raises Refused, RowError, TaskError, or pydantic's ValidationError."""
        if not isinstance(raw, dict):
            raise bad_request("bad_body", "the body must be a JSON object")
        form = self.form_of(raw)
        model = raw.get("model")
        if form.dialect == "openai" and (model is None or isinstance(model, str)):
            context.check_model(model)
        return form.plan(context, raw)


_CHAT = [{"role": "user", "content": "Is this mail spam? You won a prize! Answer yes or no."}]
_DOCUMENTS = ["Paris is the capital of France.", "Bananas are yellow."]

_RERANK = Form(
    body=reranking.RerankBody,
    plan=reranking.rerank,
    example={"query": "What is the capital of France?", "documents": _DOCUMENTS, "top_n": 1},
)
_TEI_RERANK = Form(
    body=reranking.TeiRerankBody,
    plan=reranking.tei_rerank,
    keys=frozenset({"texts"}),
    example={"query": "What is the capital of France?", "texts": _DOCUMENTS},
    dialect="tei",
)
_SGLANG_RERANK = Form(
    body=reranking.SglangRerankBody,
    plan=reranking.sglang_rerank,
    keys=frozenset({"instruct"}),
    example={"query": "What is the capital of France?", "documents": _DOCUMENTS, "return_documents": False},
)
_V1_RERANK = replace(_RERANK, plan=reranking.v1_rerank)
_PAIRS = Form(
    body=reranking.PairsBody,
    plan=reranking.score_pairs,
    example={"text_1": "What is the capital of France?", "text_2": _DOCUMENTS},
)
_SGLANG_SCORE = Form(
    body=scoring.SglangScoreBody,
    plan=scoring.sglang_score,
    keys=frozenset({"label_token_ids", "query"}),
    example={"query": "Is it true? ", "items": ["Water is wet.", "Fire is cold."], "label_token_ids": [10, 20]},
)
_CLASSIFY = Form(
    body=classifying.ClassifyBody,
    plan=classifying.classify,
    keys=frozenset({"input", "messages"}),
    example={"input": ["You won a prize!"], "labels": ["spam", "ham"]},
)


def _one(path: str, summary: str, form: Form) -> Endpoint:
    return Endpoint(paths=(path,), summary=summary, forms=(form,))


def _own(kind: str, example: Mapping[str, Any]) -> Form:
    return Form(body=own.body_of(kind), plan=partial(own.answer, kind), example=example)


ENDPOINTS: Sequence[Endpoint] = (
    _one(
        "/v1/completions",
        "Log-probabilities of prompts, and at most one generated token.",
        Form(
            body=completions.CompletionBody,
            plan=completions.completions,
            example={"prompt": "The sky is blue", "max_tokens": 1, "logprobs": 1, "echo": True},
        ),
    ),
    _one(
        "/v1/chat/completions",
        "At most one token after a conversation, with log-probabilities.",
        Form(
            body=completions.ChatBody,
            plan=completions.chat,
            example={"messages": _CHAT, "max_tokens": 1, "logprobs": True, "top_logprobs": 5},
        ),
    ),
    _one(
        "/generate",
        "Log-probabilities of prompts, and at most one generated token, as SGLang.",
        Form(
            body=generating.GenerateBody,
            plan=generating.generate,
            example={
                "text": "The sky is blue",
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": 2,
                "token_ids_logprob": [10, 20],
            },
        ),
    ),
    Endpoint(
        paths=("/v1/score", "/score"),
        summary="Probabilities of label tokens after query and items; or relevance of text pairs.",
        forms=(_SGLANG_SCORE, _PAIRS),
    ),
    _one(
        "/generative_scoring",
        "Probability of the first label token after query and each item.",
        Form(
            body=scoring.GenerativeBody,
            plan=scoring.generative_scoring,
            example={"query": "Is it true? ", "items": ["Water is wet."], "label_token_ids": [10, 20]},
        ),
    ),
    Endpoint(
        paths=("/rerank",),
        summary="Documents by relevance, as vLLM, Cohere and Jina, or as TEI where the body has texts.",
        forms=(_TEI_RERANK, _RERANK),
    ),
    Endpoint(
        paths=("/v1/rerank",),
        summary="Documents by relevance, as vLLM, Cohere and Jina; SGLang with --v1-rerank sglang or instruct.",
        forms=(_SGLANG_RERANK, _V1_RERANK),
    ),
    _one("/v2/rerank", "Documents by relevance, as vLLM, Cohere and Jina.", _RERANK),
    _one(
        "/predict",
        "Classes of texts, as TEI.",
        Form(
            body=classifying.PredictBody,
            plan=classifying.predict,
            example={"inputs": [["You won a prize!"], ["Lunch at noon?"]]},
            dialect="tei",
        ),
    ),
    _one("/classify", "Classes of texts, as vLLM and Infinity.", _CLASSIFY),
    Endpoint(
        paths=("/v1/classify",),
        summary="One of the labels for every row; or, where the body has input, as /classify.",
        forms=(_CLASSIFY, _own("classify", {"rows": ["You won a prize!"], "labels": ["spam", "ham"]})),
    ),
    _one(
        "/v1/choose",
        "One of a row's options, which are named A, B, ... in the prompt.",
        _own("choose", {"rows": ["What is wet?"], "options": ["Water", "Fire"]}),
    ),
    _one(
        "/v1/select",
        "All candidates that apply to a row.",
        _own("select", {"rows": ["Goals, goals!"], "candidates": ["sports", "politics"], "threshold": 0.5}),
    ),
    _one(
        "/v1/rank",
        "The candidates of a row from best to worst.",
        _own("rank", {"rows": ["What is the capital of France?"], "candidates": _DOCUMENTS}),
    ),
    _one(
        "/v1/score_tokens",
        "Log-probabilities of a continuation, a document, or given token ids.",
        _own("score", {"rows": [{"q": "2 + 2 =", "a": " 4"}], "template": "{q}", "continuation": "{a}", "top_k": 2}),
    ),
    _one(
        "/tokenize",
        "Token ids of a text or of messages.",
        Form(body=tokens.TokenizeBody, plan=tokens.tokenize, example={"prompt": "Hello there"}),
    ),
    _one(
        "/detokenize",
        "The text of token ids.",
        Form(body=tokens.DetokenizeBody, plan=tokens.detokenize, example={"tokens": [10, 20]}),
    ),
)

BY_PATH: Mapping[str, Endpoint] = {path: endpoint for endpoint in ENDPOINTS for path in endpoint.paths}
