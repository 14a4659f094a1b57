"""Probabilities of the operator's classes: /classify in the forms of vLLM, SGLang and Infinity, and TEI's /predict.

The classes and the prompt are the server's classify task (``--classify-task``), or ``labels`` in the body.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..core import AtomicRequest, AtomicResult, Int32Array
from ..errors import RowError
from ..tasks import ClassifyConfig, config_from_mapping
from ..tasks.common import label_scores
from ..tasks.labels import Float64Array, LabelPlan, check_labels, plan_labels, softmax
from .bodies import Body, Prompts, prompts_of, refuse_fields, texts_of
from .completions import TEMPLATING, chat_ids
from .context import Context, Plan, Results, good, usage
from .refusals import bad_request

_PAIR = "text_pair"  # the second text of a pair, for templates that compare two


class ClassifyBody(Body):
    input: Prompts | None = None
    messages: list[dict[str, Any]] | None = None
    labels: list[Any] | None = Field(None, description="Classes of this request instead of the server's own.")
    truncate_prompt_tokens: int | None = Field(None, description="-1: cut texts that are too long at their end.")
    add_special_tokens: bool = True
    raw_scores: bool | None = Field(None, description="Given: the reply has Infinity's form, all classes of each text.")
    use_activation: bool | None = Field(None, description="False: log-scores instead of probabilities.")


class PredictBody(Body):
    """A text, a pair in a list, or a list of either, each in a list of its own."""

    inputs: Any = Field(examples=["a text", [["a text"], ["another"]]])
    truncate: bool | None = None
    truncation_direction: Literal["right", "left", "Right", "Left"] = "right"
    raw_scores: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Classes:
    """What is asked: requests of each text, and how to read their log-scores, float64 [classes]."""

    names: tuple[str, ...]
    requests: list[list[AtomicRequest]]
    read: Any

    def scores(self, results: Results) -> list[Float64Array]:
        answers, scores = good(results), []
        for index, mine in enumerate(self.requests):
            scores.append(self.read(index, answers[: len(mine)]))
            answers = answers[len(mine) :]
        return scores

    @property
    def flat(self) -> list[AtomicRequest]:
        return [request for requests in self.requests for request in requests]

    @property
    def tokens(self) -> int:
        return sum(len(request.tokens) for request in self.flat)


def classify(context: Context, raw: dict[str, Any]) -> Plan:
    body = ClassifyBody.model_validate(raw)
    if (body.input is None) == (body.messages is None):
        raise bad_request("bad_input", "exactly one of input and messages is needed", "input")
    if body.messages is not None:
        refuse_fields(raw, TEMPLATING)
    config = _config(context, body.labels)
    classes = _classes(context, config, body)
    raw_scores = bool(body.raw_scores) or body.use_activation is False
    infinity = body.raw_scores is not None

    def finish(results: Results) -> object:
        scores = [_probabilities(row, raw_scores) for row in classes.scores(results)]
        head = {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "classify" if infinity else "list",
            "created": int(time.time()),
            "model": body.model or context.name,
            "usage": usage(classes.tokens),
        }
        if infinity:
            return {**head, "data": [_by_score(classes.names, row) for row in scores]}
        data = [
            {
                "index": index,
                "label": classes.names[int(np.argmax(row))],
                "probs": row.tolist(),
                "num_classes": len(row),
            }
            for index, row in enumerate(scores)
        ]
        return {**head, "data": data}

    return Plan(classes.flat, finish)


def predict(context: Context, raw: dict[str, Any]) -> Plan:
    """TEI's form: the classes by falling score, of one text or of each."""
    body = PredictBody.model_validate(raw)
    single, rows = _pairs(context, body.inputs)
    config = _config(context, None)
    if body.truncate:
        config = replace(config, truncate="left" if body.truncation_direction.lower() == "left" else "right")
    classes = _of_rows(context, config, rows)

    def finish(results: Results) -> object:
        scores = [_probabilities(row, body.raw_scores) for row in classes.scores(results)]
        told = [_by_score(classes.names, row) for row in scores]
        return told[0] if single else told

    return Plan(classes.flat, finish)


def _config(context: Context, labels: Sequence[Any] | None) -> ClassifyConfig:
    if labels is not None:
        config = config_from_mapping("classify", {"labels": labels}, "body")
        assert isinstance(config, ClassifyConfig)
        return config if context.classify is None else replace(context.classify, labels=config.labels)
    if context.classify is None:
        raise bad_request(
            "no_classes",
            "this server has no classes of its own: start it with --classify-task FILE.toml, send labels, or use "
            "/v1/classify with rows and labels",
            "labels",
        )
    return context.classify


def _classes(context: Context, config: ClassifyConfig, body: ClassifyBody) -> _Classes:
    """Texts go through the task's prompt; ids and messages are the whole context, and labels follow it."""
    given = body.input
    if body.messages is not None:
        return _of_contexts(context, replace(config, chat=True), [chat_ids(context, body.messages)])
    if isinstance(given, list) and given and not isinstance(given[0], str):
        return _of_contexts(context, config, prompts_of(context, given, "input"))
    if body.truncate_prompt_tokens is not None:
        if body.truncate_prompt_tokens != -1:
            raise bad_request(
                "bad_truncation", "truncate_prompt_tokens is -1 here, or left out", "truncate_prompt_tokens"
            )
        config = replace(config, truncate="right")
    texts = texts_of(context, given, "input")
    return _of_rows(context, config, [{config.text_column: text} for text in texts])


def _of_rows(context: Context, config: ClassifyConfig, rows: Sequence[dict[str, object]]) -> _Classes:
    prepared = context.task(config).prepare(rows)
    ready = []
    for row in prepared:
        if isinstance(row, RowError):
            raise row
        ready.append(row)

    def read(index: int, answers: Sequence[AtomicResult]) -> Float64Array:
        return label_scores(ready[index], answers)[0]

    return _Classes(_names(config), [list(row.requests) for row in ready], read)


def _of_contexts(context: Context, config: ClassifyConfig, contexts: Sequence[Int32Array]) -> _Classes:
    prefix = config.label_prefix if config.label_prefix is not None else "" if config.chat else " "
    encode = context.tokenizer.encode_continuation
    labels = tuple(tuple(encode(prefix + label.text).tolist()) for label in config.labels)
    check_labels(labels, _names(config), "rename one")
    plan: LabelPlan = plan_labels(labels, config.normalize == "vocabulary")
    requests = [list(plan.requests(context.check_length(ids, "input"))) for ids in contexts]
    for mine in requests:
        for request in mine:
            context.check_length(request.tokens, "input with its labels")

    def read(index: int, answers: Sequence[AtomicResult]) -> Float64Array:
        return plan.scores(requests[index], answers)

    return _Classes(_names(config), requests, read)


def _names(config: ClassifyConfig) -> tuple[str, ...]:
    return tuple(label.name for label in config.labels)


def _probabilities(scores: Float64Array, raw: bool) -> Float64Array:
    return scores if raw else softmax(scores)


def _by_score(names: Sequence[str], scores: Float64Array) -> list[dict[str, Any]]:
    order = np.argsort(-scores, kind="stable").tolist()
    return [{"score": float(scores[index]), "label": names[index]} for index in order]


def _pairs(context: Context, inputs: object) -> tuple[bool, list[dict[str, object]]]:
    """Whether there is one text only, and the rows for the task's template."""
    column = context.classify.text_column if context.classify is not None else "text"

    def row(entry: object) -> dict[str, object]:
        texts = [entry] if isinstance(entry, str) else entry
        if not isinstance(texts, list) or len(texts) not in (1, 2) or not all(isinstance(text, str) for text in texts):
            raise bad_request("bad_input", "inputs is a text, a pair of texts, or a list of lists of them", "inputs")
        return dict(zip((column, _PAIR), texts, strict=False))

    if isinstance(inputs, str):
        return True, [row(inputs)]
    if isinstance(inputs, list) and inputs and all(isinstance(entry, str) for entry in inputs):
        if len(inputs) > 2:
            raise bad_request("bad_input", "a list of texts is one pair; several texts stand in a list each", "inputs")
        return True, [row(inputs)]
    if not isinstance(inputs, list):
        raise bad_request("bad_input", "inputs is a text, a pair of texts, or a list of lists of them", "inputs")
    context.check_rows(len(inputs), "inputs")
    return False, [row(entry) for entry in inputs]
