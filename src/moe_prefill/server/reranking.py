"""Relevance of documents to a query: /rerank in the forms of vLLM, Cohere, Jina and TEI, and /score of text pairs.

All ask the operator's rerank task (``--rerank-task``), prompt and chat template applied here: a document's relevance
is P(yes) / (P(yes) + P(no)).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..core import PreparedRow
from ..errors import RowError
from ..tasks import RankConfig, Task
from ..tasks.common import label_scores
from .bodies import Body, Texts, refuse_fields, texts_of
from .context import Context, Plan, Results, good, usage
from .refusals import bad_request

_INSTRUCT = "instruct"  # the placeholder for what SGLang calls so and vLLM an instruction


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


class SglangRerankBody(Body):
    """SGLang's form. ``instruct`` is the {instruct} of the server's rerank task."""

    query: str
    documents: list[str]
    instruct: str | None = None
    top_n: int | None = None
    return_documents: bool = True


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
    refuse_fields(raw, {"rank_fields": ([], ["text"])})
    documents = [_document(context, document, body.max_tokens_per_doc) for document in body.documents]
    top_n = _top_n(body.top_n)

    def reply(scores: Sequence[float], tokens: int) -> dict[str, Any]:
        results: list[dict[str, Any]] = []
        for index in _ranked(scores)[:top_n]:
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

    asked = _Asked([(body.query, documents)], "documents", keep=body.truncate_prompt_tokens, raw_scores=body.raw_scores)
    return _plan(context, asked, reply)


def sglang_rerank(context: Context, raw: dict[str, Any]) -> Plan:
    """The same relevance as a bare list."""
    body = SglangRerankBody.model_validate(raw)
    top_n, request_id = _top_n(body.top_n), f"rerank-{uuid.uuid4().hex}"

    def reply(scores: Sequence[float], tokens: int) -> list[dict[str, Any]]:
        return [
            {
                "score": scores[index],
                "document": body.documents[index] if body.return_documents else None,
                "index": index,
                "meta_info": {"id": request_id, "prompt_tokens": tokens},
            }
            for index in _ranked(scores)[:top_n]
        ]

    return _plan(context, _Asked([(body.query, body.documents)], "documents", instruct=body.instruct), reply)


def v1_rerank(context: Context, raw: dict[str, Any]) -> Plan:
    """Of two forms whose bodies may be alike, the one that the operator has set."""
    return sglang_rerank(context, raw) if context.v1_rerank == "sglang" else rerank(context, raw)


def tei_rerank(context: Context, raw: dict[str, Any]) -> Plan:
    body = TeiRerankBody.model_validate(raw)

    def reply(scores: Sequence[float], tokens: int) -> list[dict[str, Any]]:
        text = {"text": body.texts} if body.return_text else {}
        return [
            {"index": index, **{key: texts[index] for key, texts in text.items()}, "score": scores[index]}
            for index in _ranked(scores)
        ]

    asked = _Asked(
        [(body.query, body.texts)],
        "texts",
        keep=-1 if body.truncate else None,
        side="left" if body.truncation_direction.lower() == "left" else "right",
        raw_scores=body.raw_scores,
    )
    return _plan(context, asked, reply)


def score_pairs(context: Context, raw: dict[str, Any]) -> Plan:
    body = PairsBody.model_validate(raw)
    instruct = raw.get("instruction")
    if instruct is not None and not isinstance(instruct, str):
        raise bad_request("bad_text", "instruction is a text", "instruction")
    first, left = _side(context, body, ("text_1", "queries", "data_1"))
    second, right = _side(context, body, ("text_2", "documents", "items", "data_2"))
    if len(left) == 1:
        rows = [(left[0], right)]
    elif len(left) == len(right):
        rows = [(one, [other]) for one, other in zip(left, right, strict=True)]
    else:
        raise bad_request(
            "bad_pairs",
            f"{len(left)} texts stand beside {len(right)}; the first side has one text or as many",
            first,
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

    asked = _Asked(
        rows,
        second,
        first,
        keep=body.truncate_prompt_tokens,
        raw_scores=body.use_activation is False,
        instruct=instruct,
    )
    return _plan(context, asked, reply)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Queries with their documents, in the fields ``query_param`` and ``param``. ``keep`` and ``side``: how prompts are
    cut, None: not. ``raw_scores``: log-odds. ``instruct`` fills the task's placeholder of that name.
    """

    rows: Sequence[tuple[str, Sequence[str]]]
    param: str
    query_param: str = "query"
    keep: int | None = None
    side: Literal["left", "right"] = "right"
    raw_scores: bool = False
    instruct: str | None = None


def _plan(context: Context, asked: _Asked, reply: Any) -> Plan:
    """Scores of each row's documents, row after row."""
    context.check_rows(sum(len(documents) for _, documents in asked.rows), asked.param)
    if not all(query.strip() for query, _ in asked.rows):
        raise bad_request(
            "empty_text", f"{asked.query_param} is empty; the prompt needs a text there", asked.query_param
        )
    config, max_tokens = _truncating(context.rerank, asked.keep, asked.side)
    query_column, column = config.text_column, config.candidates_column
    assert column is not None, "the server's rerank task reads its candidates from a column"
    task = context.task(config, max_tokens)
    fixed = _instruction(task, asked.instruct)
    table: list[Mapping[str, object]] = [
        {query_column: query, column: list(documents), **fixed} for query, documents in asked.rows
    ]
    prepared = [_ready(row) for row in task.prepare(table)]
    requests = [request for row in prepared for request in row.requests]

    def finish(results: Results) -> object:
        scores: list[float] = []
        answers = good(results)
        for row in prepared:
            mine, answers = answers[: len(row.requests)], answers[len(row.requests) :]
            for yes, no in label_scores(row, mine):
                odds = float(yes - no)
                scores.append(odds if asked.raw_scores else float(0.5 * (1.0 + np.tanh(odds / 2))))
        return reply(scores, sum(len(request.tokens) for request in requests))

    return Plan(requests, finish)


def _instruction(task: Task, given: str | None) -> dict[str, object]:
    """The columns that an instruction adds; it is refused where the task would not read it."""
    reads = _INSTRUCT in task.placeholders
    if given is None and not reads:
        return {}
    if given is None:
        message = f"this server's rerank task reads {{{_INSTRUCT}}}: send {_INSTRUCT}"
    elif not reads:
        message = (
            f"this server's rerank task does not read {_INSTRUCT}: leave it out, or start the server with a "
            f"--rerank-task whose template has {{{_INSTRUCT}}}"
        )
    else:
        return {_INSTRUCT: given}
    raise bad_request("bad_instruct", message, _INSTRUCT)


def _top_n(given: int | None) -> int | None:
    """How many to tell; None: all."""
    if given is not None and given < 0:
        raise bad_request("bad_top_n", f"top_n is {given}; it is at least 1, or 0 for all", "top_n")
    return given or None


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


def _side(context: Context, body: PairsBody, names: Sequence[str]) -> tuple[str, list[str]]:
    """The one field of ``names`` that is given, and its texts."""
    given = [(name, getattr(body, name)) for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        raise bad_request("bad_pairs", f"exactly one of {', '.join(names)} is needed; {len(given)} are given", names[0])
    name, value = given[0]
    return name, texts_of(context, value, name)
