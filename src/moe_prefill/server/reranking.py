"""Relevance of documents to a query: /rerank in the forms of vLLM, Cohere, Jina and TEI, and /score of text pairs.

All ask the operator's rerank task (``--rerank-task``), prompt and chat template applied here: a document's relevance
is P(yes) / (P(yes) + P(no)).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..core import PreparedRow
from ..errors import RowError
from ..tasks import RankConfig
from ..tasks.common import label_scores
from .bodies import Body, Texts, refuse_fields, texts_of
from .context import Context, Plan, Results, good, usage
from .refusals import bad_request


class RerankBody(Body):
    query: str
    documents: list[str | dict[str, Any]] = Field(description='Texts, or objects with a "text".')
    top_n: int | None = Field(None, description="Tell the best N only; 0 or nothing: all.")
    return_documents: bool | None = None
    raw_scores: bool = Field(False, description="Log-odds instead of probabilities.")
    truncate_prompt_tokens: int | None = Field(
        None, description="Cut the longer of query and document to bring a prompt to N tokens; -1: to the limit."
    )
    max_tokens_per_doc: int | None = Field(None, description="Cut documents to that many tokens.")


class TeiRerankBody(Body):
    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None
    truncation_direction: Literal["right", "left", "Right", "Left"] = "right"


class PairsBody(Body):
    """One text with many, or two lists of equal length, in vLLM's names for them."""

    text_1: Texts | None = None
    queries: Texts | None = None
    data_1: Texts | None = None
    text_2: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_2: Texts | None = None
    truncate_prompt_tokens: int | None = None
    use_activation: bool | None = Field(None, description="False: log-odds instead of probabilities.")


def rerank(context: Context, raw: dict[str, Any]) -> Plan:
    """vLLM's form, which holds what Cohere's and Jina's clients read."""
    body = RerankBody.model_validate(raw)
    documents = [_document(context, document, body.max_tokens_per_doc) for document in body.documents]
    if body.top_n is not None and body.top_n < 0:
        raise bad_request("bad_top_n", f"top_n is {body.top_n}; it is at least 1, or 0 for all", "top_n")

    def reply(scores: Sequence[float], tokens: int) -> dict[str, Any]:
        results: list[dict[str, Any]] = []
        for index in _ranked(scores)[: body.top_n or None]:
            entry: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if body.return_documents is not False:
                entry["document"] = {"text": documents[index]}
            results.append(entry)
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "object": "rerank",
            "created": int(time.time()),
            "model": body.model or context.name,
            "results": results,
            "usage": usage(tokens),
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }

    rows = [(body.query, documents)]
    return _plan(context, rows, body.truncate_prompt_tokens, "right", body.raw_scores, reply, "documents")


def tei_rerank(context: Context, raw: dict[str, Any]) -> Plan:
    body = TeiRerankBody.model_validate(raw)

    def reply(scores: Sequence[float], tokens: int) -> list[dict[str, Any]]:
        text = {"text": body.texts} if body.return_text else {}
        return [
            {"index": index, **{key: texts[index] for key, texts in text.items()}, "score": scores[index]}
            for index in _ranked(scores)
        ]

    side: Literal["left", "right"] = "left" if body.truncation_direction.lower() == "left" else "right"
    keep = -1 if body.truncate else None
    return _plan(context, [(body.query, body.texts)], keep, side, body.raw_scores, reply, "texts")


def score_pairs(context: Context, raw: dict[str, Any]) -> Plan:
    body = PairsBody.model_validate(raw)
    refuse_fields(raw, {"instruction": ()})
    left = _side(context, body, ("text_1", "queries", "data_1"))
    right = _side(context, body, ("text_2", "documents", "items", "data_2"))
    if len(left) == 1:
        rows = [(left[0], right)]
    elif len(left) == len(right):
        rows = [(one, [other]) for one, other in zip(left, right, strict=True)]
    else:
        raise bad_request(
            "bad_pairs",
            f"{len(left)} texts stand beside {len(right)}; the first side has one text or as many",
            "text_1",
        )

    def reply(scores: Sequence[float], tokens: int) -> dict[str, Any]:
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or context.name,
            "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
            "usage": usage(tokens),
        }

    return _plan(context, rows, body.truncate_prompt_tokens, "right", body.use_activation is False, reply, "text_2")


def _plan(
    context: Context,
    rows: Sequence[tuple[str, Sequence[str]]],
    keep: int | None,
    side: Literal["left", "right"],
    raw_scores: bool,
    reply: Any,
    param: str,
) -> Plan:
    """Scores of each row's documents, row after row."""
    context.check_rows(sum(len(documents) for _, documents in rows), param)
    config, max_tokens = _truncating(context.rerank, keep, side)
    query_column, column = config.text_column, config.candidates_column
    assert column is not None, "the server's rerank task reads its candidates from a column"
    task = context.task(config, max_tokens)
    table: list[Mapping[str, object]] = [{query_column: query, column: list(documents)} for query, documents in rows]
    prepared = [_ready(row) for row in task.prepare(table)]
    requests = [request for row in prepared for request in row.requests]

    def finish(results: Results) -> object:
        scores: list[float] = []
        answers = good(results)
        for row in prepared:
            mine, answers = answers[: len(row.requests)], answers[len(row.requests) :]
            for yes, no in label_scores(row, mine):
                odds = float(yes - no)
                scores.append(odds if raw_scores else float(0.5 * (1.0 + np.tanh(odds / 2))))
        return reply(scores, sum(len(request.tokens) for request in requests))

    return Plan(requests, finish)


def _truncating(config: RankConfig, keep: int | None, side: Literal["left", "right"]) -> tuple[RankConfig, int | None]:
    if keep is None:
        return config, None
    if keep < -1 or keep == 0:
        raise bad_request("bad_truncation", f"truncate_prompt_tokens is {keep}; it is at least 1, or -1")
    return replace(config, truncate=side), None if keep == -1 else keep


def _ready(row: PreparedRow | RowError) -> PreparedRow:
    if isinstance(row, RowError):
        raise row
    return row


def _ranked(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def _document(context: Context, document: str | dict[str, Any], max_tokens: int | None) -> str:
    text = document if isinstance(document, str) else _text_of(document)
    if max_tokens is None:
        return text
    if max_tokens < 1:
        raise bad_request(
            "bad_truncation", f"max_tokens_per_doc is {max_tokens}; it is at least 1", "max_tokens_per_doc"
        )
    spans = context.tokenizer.offsets(text)
    return text if len(spans) <= max_tokens else text[: spans[max_tokens][0]]


def _text_of(document: dict[str, Any]) -> str:
    """The text of Cohere's and Jina's {"text"} and of vLLM's {"content": [{"type": "text", "text"}]}."""
    parts = document.get("content")
    if parts is None and isinstance(document.get("text"), str):
        return str(document["text"])
    if (
        isinstance(parts, list)
        and parts
        and all(isinstance(part, dict) and part.get("type") == "text" for part in parts)
    ):
        texts = [part.get("text") for part in parts]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise bad_request("bad_document", 'a document is a text, {"text": ...}, or content parts of type text', "documents")


def _side(context: Context, body: PairsBody, names: Sequence[str]) -> list[str]:
    given = [(name, getattr(body, name)) for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        raise bad_request("bad_pairs", f"exactly one of {', '.join(names)} is needed; {len(given)} are given", names[0])
    name, value = given[0]
    return texts_of(context, value, name)
