"""/v1/completions and /v1/chat/completions: log-probabilities of prompts, and at most one generated token."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, WithJsonSchema

from ..core import Int32Array
from ..text import Tokenizer
from .asked import (
    WHAT_THIS_IS,
    Choice,
    Question,
    Scored,
    Scores,
    by_text,
    entries,
    max_tokens_of,
    plan_questions,
    top_of,
)
from .bodies import Body, Ids, Prompts, prompts_of, refuse_fields
from .context import Context, Plan, usage
from .refusals import bad_request

# How the model's chat template would be used in another way.
TEMPLATING: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "chat_template": (),
    "documents": ([],),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
}
_GENERATION: dict[str, tuple[object, ...]] = {
    **TEMPLATING,
    "stream": (False,),
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "min_tokens": (0, 1),
    "ignore_eos": (False,),
    "response_format": ({"type": "text"},),
    "logprob_token_ids": (),
    "guided_regex": (),
    "guided_json": (),
    "guided_grammar": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "structural_tag": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "lora_path": (),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
}


class _Sampling(Body):
    """Fields that both endpoints have. The generated token is always the most likely one, at any temperature."""

    max_tokens: int | None = Field(None, description="0 or 1.")
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]})] = None
    prompt_logprobs: int | None = Field(None, description="Most likely tokens to list at each place of the prompt.")
    truncate_prompt_tokens: int | None = Field(
        None, description="Keep the last N tokens of the prompt; -1: as many as the server takes."
    )
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Ids | None = None
    guided_choice: list[str] | None = None
    structured_outputs: dict[str, Any] | None = Field(
        None, description='Only {"choice": [...]}, each of one token; for longer ones use /v1/classify.'
    )


class CompletionBody(_Sampling):
    prompt: Prompts
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool = True


class ChatBody(_Sampling):
    messages: list[dict[str, Any]] = Field(description="Texts of the roles system, user and assistant.")
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


def completions(context: Context, raw: dict[str, Any]) -> Plan:
    body = CompletionBody.model_validate(raw)
    refuse_fields(raw, _GENERATION)
    max_tokens = max_tokens_of(context, body.max_tokens, "max_tokens")
    count = top_of(context, body.logprobs, "logprobs")
    prompt_count = top_of(context, body.prompt_logprobs, "prompt_logprobs")
    prompts = prompts_of(context, body.prompt, "prompt", add_special_tokens=body.add_special_tokens)
    stops = _stops(body.stop)
    choice = _choice(context, body)
    echo = bool(body.echo)
    questions = [
        Question(
            ids=context.check_length(_truncated(context, ids, body.truncate_prompt_tokens), f"prompt[{index}]"),
            of_prompt=(echo and count is not None) or prompt_count is not None,
            generate=bool(max_tokens),
            top_k=max(count or 0, prompt_count or 0),
            choice=choice,
            logprobs=count is not None,
        )
        for index, ids in enumerate(prompts)
    ]
    texts = _echoed(context.tokenizer, body, questions) if echo else [""] * len(questions)

    def choice_of(index: int, question: Question, before: Sequence[Scored], token: Scored | None) -> dict[str, Any]:
        text, reason = _text_of(context.tokenizer, token, stops)
        answer: dict[str, Any] = {
            "index": index,
            "text": texts[index] + text,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": None,
        }
        if count is not None:
            answer["logprobs"] = _arrays(context.tokenizer, question.ids, before, token, count, echo)
        if prompt_count is not None:
            answer["prompt_logprobs"] = _prompt_logprobs(context.tokenizer, before, prompt_count)
        return answer

    def reply(scores: Scores) -> dict[str, Any]:
        pairs = enumerate(zip(questions, scores, strict=True))
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or context.name,
            "choices": [choice_of(index, question, *score) for index, (question, score) in pairs],
            "usage": usage(sum(len(question.ids) for question in questions), max_tokens * len(questions)),
        }

    return plan_questions(context, questions, reply)


def chat(context: Context, raw: dict[str, Any]) -> Plan:
    body = ChatBody.model_validate(raw)
    refuse_fields(raw, {**_GENERATION, "echo": (False,)})
    given = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    max_tokens = max_tokens_of(context, given, "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("bad_logprobs", "top_logprobs needs logprobs: true", "top_logprobs")
    count = (top_of(context, body.top_logprobs, "top_logprobs") or 0) if body.logprobs else None
    prompt_count = top_of(context, body.prompt_logprobs, "prompt_logprobs")
    ids = chat_ids(context, body.messages)
    stops = _stops(body.stop)
    question = Question(
        ids=context.check_length(_truncated(context, ids, body.truncate_prompt_tokens), "messages"),
        of_prompt=prompt_count is not None,
        generate=bool(max_tokens),
        top_k=max(count or 0, prompt_count or 0),
        choice=_choice(context, body),
        logprobs=count is not None,
    )

    def reply(scores: Scores) -> dict[str, Any]:
        before, token = scores[0]
        text, reason = _text_of(context.tokenizer, token, stops)
        answer: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": reason,
        }
        if count is not None:
            content = [_content(context.tokenizer, token, count)] if token is not None else []
            answer["logprobs"] = {"content": content, "refusal": None}
        told: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model or context.name,
            "choices": [answer],
            "usage": usage(len(question.ids), max_tokens),
        }
        if prompt_count is not None:
            told["prompt_logprobs"] = _prompt_logprobs(context.tokenizer, before, prompt_count)
        return told

    return plan_questions(context, [question], reply)


def chat_ids(context: Context, messages: Sequence[dict[str, Any]]) -> Int32Array:
    """Ids of messages under the model's chat template; its text is tokenised without a begin token of ours."""
    context.check_rows(len(messages), "messages")
    turns = [{**message, "role": _role(message), "content": _content_text(message)} for message in messages]
    text = context.chat().render_messages(turns)
    return context.encode([text], "messages", add_special_tokens=False)[0]


def _stops(value: object) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad_request("bad_stop", "stop is a text or a list of texts", "stop")
    return [stop for stop in stops if stop]


def _truncated(context: Context, ids: Int32Array, keep: int | None) -> Int32Array:
    if keep is None:
        return ids
    if keep < -1 or keep == 0:
        raise bad_request(
            "bad_truncation", f"truncate_prompt_tokens is {keep}; it is at least 1, or -1", "truncate_prompt_tokens"
        )
    return ids[-(context.limits.max_request_tokens if keep == -1 else keep) :]


def _choice(context: Context, body: _Sampling) -> Choice:
    lists = [_allowed_ids(context, body), _structured(context, body)]
    given = [ids for ids in lists if ids is not None]
    if len(given) > 1:
        raise bad_request("bad_choice", "allowed_token_ids and a structured choice exclude each other")
    return Choice(allowed=given[0] if given else None, bias=_bias(context, body.logit_bias or {}))


def _allowed_ids(context: Context, body: _Sampling) -> tuple[int, ...] | None:
    if body.allowed_token_ids is None:
        return None
    ids = tuple(dict.fromkeys(context.ids(body.allowed_token_ids, "allowed_token_ids").tolist()))
    _check_count(context, len(ids), "allowed_token_ids")
    return ids


def _structured(context: Context, body: _Sampling) -> tuple[int, ...] | None:
    texts: object = body.guided_choice
    outputs = {key: value for key, value in (body.structured_outputs or {}).items() if value is not None}
    if outputs:
        if set(outputs) != {"choice"}:
            raise bad_request("unsupported", 'structured_outputs takes {"choice": [...]} only', "structured_outputs")
        texts = outputs["choice"]
    if texts is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise bad_request(
            "bad_choice", "a structured choice is a list of texts that are not empty", "structured_outputs"
        )
    _check_count(context, len(texts), "structured_outputs")
    ids = [context.tokenizer.encode_continuation(text).tolist() for text in texts]
    for text, tokens in zip(texts, ids, strict=True):
        if len(tokens) != 1:
            raise bad_request(
                "choice_of_several_tokens",
                f"the choice {text!r} has {len(tokens)} tokens; {WHAT_THIS_IS}. /v1/classify takes longer labels",
                "structured_outputs",
            )
    chosen = [tokens[0] for tokens in ids]
    if len(set(chosen)) < len(chosen):
        raise bad_request("bad_choice", "two choices are the same token", "structured_outputs")
    return tuple(chosen)


def _bias(context: Context, given: dict[str, float]) -> dict[int, float]:
    _check_count(context, len(given) or 1, "logit_bias")
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise bad_request("bad_ids", f"logit_bias has the key {key[:40]!r}; its keys are token ids", "logit_bias")
        if not -100.0 <= value <= 100.0:
            raise bad_request("bad_bias", f"logit_bias of {key} is {value}; it is between -100 and 100", "logit_bias")
        bias[int(key)] = value
    context.ids(list(bias), "logit_bias")
    return bias


def _check_count(context: Context, count: int, param: str) -> None:
    if not 1 <= count <= context.allow.max_label_ids:
        raise bad_request(
            "bad_choice", f"{param} has {count} entries; from 1 to {context.allow.max_label_ids} are allowed", param
        )


def _role(message: dict[str, Any]) -> str:
    role = message.get("role")
    if not isinstance(role, str):
        raise bad_request("bad_messages", "every message has a role that is a text", "messages")
    return role


def _content_text(message: dict[str, Any]) -> str:
    """The text of a message: a string, or parts of type text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise bad_request("bad_messages", "the content of a message is a text, or a list of parts of type text", "messages")


def _text_of(tokenizer: Tokenizer, token: Scored | None, stops: Sequence[str]) -> tuple[str, str]:
    """Text and finish reason of what was generated."""
    if token is None:
        return "", "length"
    if token.token == tokenizer.eos_id:
        return "", "stop"
    text = tokenizer.token_string(token.token)
    ends = [text.index(stop) for stop in stops if stop in text]
    return (text[: min(ends)], "stop") if ends else (text, "length")


def _echoed(tokenizer: Tokenizer, body: CompletionBody, questions: Sequence[Question]) -> list[str]:
    """What echo puts before the generated text: the prompt as it was given, or its ids in words."""
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if all(isinstance(text, str) for text in given) and body.truncate_prompt_tokens is None:
        return list(given)
    return [tokenizer.decode(question.ids) for question in questions]


def _arrays(
    tokenizer: Tokenizer, ids: Int32Array, before: Sequence[Scored], token: Scored | None, count: int, echo: bool
) -> dict[str, list[Any]]:
    """The four arrays, an entry a token: with echo the prompt (its first value null), then the generated token."""
    told = [*(before if echo else ()), *([token] if token is not None else ())]
    tokens = [tokenizer.token_string(scored.token) for scored in told]
    logprobs: list[float | None] = [scored.logprob for scored in told]
    tops: list[dict[str, float] | None] = [by_text(tokenizer, scored, count) for scored in told]
    if echo:
        tokens, logprobs, tops = [tokenizer.token_string(int(ids[0])), *tokens], [None, *logprobs], [None, *tops]
    starts = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
    return {"text_offset": starts, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": tops}


def _prompt_logprobs(tokenizer: Tokenizer, before: Sequence[Scored], count: int) -> list[dict[str, Any] | None]:
    """vLLM's form. ``rank`` is null for a token that is not among the listed ones: it was not computed."""
    places: list[dict[str, Any] | None] = [None]
    for scored in before:
        ranks = {token: rank for rank, (token, _) in enumerate(scored.top, 1)}
        places.append(
            {
                str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": tokenizer.token_string(token)}
                for token, value in entries(scored, count)
            }
        )
    return places


def _content(tokenizer: Tokenizer, scored: Scored, count: int) -> dict[str, Any]:
    def named(token: int, value: float) -> dict[str, Any]:
        text = tokenizer.token_string(token)
        # A token that is part of a character has no text, so its bytes are not known.
        return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}

    top = [named(token, value) for token, value in entries(scored, count)] if count else []
    return {**named(scored.token, scored.logprob), "top_logprobs": top}
