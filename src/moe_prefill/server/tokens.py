"""/tokenize, /detokenize and /tokenizer_info, as lm-evaluation-harness and vLLM's clients read them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .bodies import Body, Ids, refuse_fields
from .completions import TEMPLATING, chat_ids
from .context import Context, Plan
from .refusals import bad_request


class TokenizeBody(Body):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(
        None, description="Under the model's chat template, instead of prompt."
    )
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    tokens: Ids


def tokenize(context: Context, raw: dict[str, Any]) -> Plan:
    body = TokenizeBody.model_validate(raw)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("bad_prompt", "exactly one of prompt and messages is needed", "prompt")
    if body.messages is not None:
        refuse_fields(raw, TEMPLATING)
        ids = chat_ids(context, body.messages).tolist()
    else:
        ids = context.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens).tolist()
    strings = [context.tokenizer.token_string(token) for token in ids] if body.return_token_strs else None
    told = {
        "count": len(ids),
        "max_model_len": context.limits.max_request_tokens,
        "tokens": ids,
        "token_strs": strings,
    }
    return Plan([], lambda results: told)


def detokenize(context: Context, raw: dict[str, Any]) -> Plan:
    body = DetokenizeBody.model_validate(raw)
    ids = context.ids(body.tokens, "tokens").tolist()
    text = context.tokenizer.decode(ids) if ids else ""
    return Plan([], lambda results: {"prompt": text, "text": text})  # vLLM's key, and SGLang's


def tokenizer_info(context: Context) -> dict[str, Any]:
    tokenizer = context.tokenizer
    named = {name: tokenizer.special_tokens.get(name) for name in ("eos_token", "bos_token", "pad_token", "unk_token")}
    return {
        **named,
        "chat_template": tokenizer.chat_template,
        "add_bos_token": bool(len(tokenizer.prefix_ids)),
        "vocab_size": context.limits.vocab_size,
        "model_max_length": context.limits.max_request_tokens,
    }
