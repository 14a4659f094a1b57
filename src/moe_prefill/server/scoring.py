"""Scores of items after a query by given label ids: SGLang's /v1/score and vLLM's /generative_scoring."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from ..core import AtomicRequest, AtomicResult, Int32Array
from ..tasks.labels import softmax
from .bodies import Body, Ids, Items, TextOrIds, prompts_of, refuse_fields
from .context import Context, Plan, Results, good, usage
from .refusals import bad_request


class ItemsBody(Body):
    """A query with items, each of them one prompt. Ids are put together as they are given."""

    query: TextOrIds
    items: Items
    label_token_ids: Ids = Field(description="Ids of the tokens whose probabilities after each prompt are asked.")
    item_first: bool = False


class SglangScoreBody(ItemsBody):
    apply_softmax: bool = Field(False, description="Over the labels; false: probabilities over the whole vocabulary.")


class GenerativeBody(ItemsBody):
    apply_softmax: bool = Field(True, description="Over the labels; false: probabilities over the whole vocabulary.")
    add_special_tokens: bool = True
    priority: int = 0
    request_id: str | None = None


def sglang_score(context: Context, raw: dict[str, Any]) -> Plan:
    """Every label's probability of every item. Query and item are one text before they are tokenised."""
    body = SglangScoreBody.model_validate(raw)
    refuse_fields(raw, {"return_pooled_hidden_states": (False,)})
    if isinstance(body.query, str):
        items = [body.items] if isinstance(body.items, str) else body.items
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise bad_request("bad_items", "query is a text, so items are texts too", "items")
        texts = [item + body.query if body.item_first else body.query + item for item in items]
        prompts = prompts_of(context, texts, "items") if texts else []
    else:
        prompts = _joined(context, body, add_special_tokens=False)

    def reply(scores: list[list[float]], tokens: int) -> dict[str, Any]:
        return {"scores": scores, "model": body.model or context.name, "usage": usage(tokens), "object": "scoring"}

    return _plan(context, body, body.apply_softmax, prompts, reply)


def generative_scoring(context: Context, raw: dict[str, Any]) -> Plan:
    """The first label's probability of every item. Query and items are tokenised apart and put together."""
    body = GenerativeBody.model_validate(raw)
    prompts = _joined(context, body, add_special_tokens=body.add_special_tokens)

    def reply(scores: list[list[float]], tokens: int) -> dict[str, Any]:
        return {
            "id": f"generative-scoring-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or context.name,
            "data": [{"index": index, "object": "score", "score": row[0]} for index, row in enumerate(scores)],
            "usage": usage(tokens),
        }

    return _plan(context, body, body.apply_softmax, prompts, reply)


def _joined(context: Context, body: ItemsBody, *, add_special_tokens: bool) -> list[Int32Array]:
    if isinstance(body.query, str):
        query = context.encode([body.query], "query", add_special_tokens=add_special_tokens and not body.item_first)[0]
    else:
        query = context.ids(body.query, "query")
    items = prompts_of(context, body.items, "items", add_special_tokens=add_special_tokens and body.item_first)
    return [np.concatenate([item, query] if body.item_first else [query, item]) for item in items]


def _plan(context: Context, body: ItemsBody, apply_softmax: bool, prompts: Sequence[Int32Array], reply: Any) -> Plan:
    context.check_rows(len(prompts), "items")
    labels = context.ids(body.label_token_ids, "label_token_ids")
    if not 1 <= len(labels) <= context.allow.max_label_ids:
        limit = context.allow.max_label_ids
        raise bad_request(
            "bad_labels", f"label_token_ids has {len(labels)} ids; from 1 to {limit} are allowed", "label_token_ids"
        )
    requests = [
        AtomicRequest.candidates(context.check_length(ids, f"items[{index}]"), labels, vocabulary=not apply_softmax)
        for index, ids in enumerate(prompts)
    ]

    def scores_of(request: AtomicRequest, result: AtomicResult) -> list[float]:
        if apply_softmax:
            return [float(value) for value in softmax(result.logits.astype(np.float64))]
        return [float(value) for value in np.exp(result.logprobs(request).astype(np.float64))]

    def finish(results: Results) -> object:
        scores = [scores_of(*pair) for pair in zip(requests, good(results), strict=True)]
        return reply(scores, sum(len(request.tokens) for request in requests))

    return Plan(requests, finish)
