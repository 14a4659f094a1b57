"""SGLang's own /generate, as those use it who score with it: log-probabilities of prompts and at most one token.

In ``meta_info`` a token is [log-probability, id, its text or null]. Lists of the prompt begin at ``logprob_start_len``
with a null, for nothing is asked before their first token. Lists of the output have the one place after the prompt,
also with ``max_new_tokens`` 0, where no token is generated.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, WithJsonSchema

from ..core import Int32Array
from ..text import Tokenizer
from .asked import Question, Scored, Scores, max_tokens_of, plan_questions, top_of
from .bodies import Body, Texts, either, list_of, prompts_of, refuse_fields, texts_of
from .context import Context, Plan
from .refusals import bad_request

_MAX_PROBED = 1 << 20  # values of ``token_ids_logprob`` at places of the prompts of one body

_REFUSED: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "input_embeds": (),
    "image_data": (),
    "audio_data": (),
    "video_data": (),
    "lora_path": (),
    "session_params": (),
    "custom_logit_processor": (),
    "return_hidden_states": (False,),
}
_REFUSED_SAMPLING: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "min_new_tokens": (0, 1),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "logit_bias": ({},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
}

_IDS: dict[str, Any] = list_of({"type": "integer", "minimum": 0})
_Ids = Annotated[Any, WithJsonSchema({"anyOf": [_IDS, list_of(_IDS), {"type": "null"}]})]
_Sampling = Annotated[Any, either({"type": "object"}, list_of({"type": "object"}), {"type": "null"})]


class GenerateBody(Body):
    """Every field but ``text``, ``input_ids`` and ``return_text_in_logprobs`` is of all prompts, or a list of one for
    each.
    """

    text: Texts | None = Field(None, description="Or input_ids.")
    input_ids: _Ids = None
    sampling_params: _Sampling = Field(None, description="max_new_tokens: 0 or 1. The most likely token is generated.")
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = Field(
        None, description="Tell the prompt's tokens from this one on; -1: of the output only."
    )
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: _Ids = Field(None, description="Ids whose log-probabilities are told of every place.")
    return_text_in_logprobs: bool = False
    rid: str | list[str] | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Asked:
    """One prompt: ``start`` None: nothing of the prompt is told; ``top`` and ``probes`` None: they were not asked."""

    ids: Int32Array
    max_new: int
    logprobs: bool
    start: int | None
    top: int
    probes: Int32Array | None
    rid: str

    @property
    def question(self) -> Question:
        return Question(
            ids=self.ids,
            of_prompt=self.start is not None,
            generate=bool(self.max_new or self.top or self.probes is not None),
            top_k=self.top,
            logprobs=self.logprobs,
            start=self.start or 0,
            probes=np.zeros(0, np.int32) if self.probes is None else self.probes,
        )


def generate(context: Context, raw: dict[str, Any]) -> Plan:
    body = GenerateBody.model_validate(raw)
    refuse_fields(raw, _REFUSED)
    single, prompts = _prompts(context, body)
    asked = _asked(context, body, prompts)
    questions = [one.question for one in asked]
    probed = sum(question.places * len(question.probes) for question in questions)
    if probed > _MAX_PROBED:
        raise bad_request(
            "too_many_values",
            f"token_ids_logprob asks for {probed} values of the prompts' tokens, {_MAX_PROBED} are allowed; ask for "
            "fewer ids or prompts, or raise logprob_start_len",
            "token_ids_logprob",
        )
    tell = _teller(context.tokenizer, body.return_text_in_logprobs)

    def reply(scores: Scores) -> object:
        told = [_told(context.tokenizer, one, *score, tell) for one, score in zip(asked, scores, strict=True)]
        return told[0] if single else told

    return plan_questions(context, questions, reply)


def _prompts(context: Context, body: GenerateBody) -> tuple[bool, list[Int32Array]]:
    """Whether there is one prompt only, which is answered without a list, and the ids of all."""
    if (body.text is None) == (body.input_ids is None):
        raise bad_request("bad_prompt", "exactly one of text and input_ids is needed", "text")
    if body.text is not None:
        single = isinstance(body.text, str)
        return single, context.encode(texts_of(context, body.text, "text"), "text")
    given = body.input_ids
    if not isinstance(given, list) or any(isinstance(entry, str) for entry in given):
        raise bad_request("bad_prompt", "input_ids is a list of token ids, or a list of such lists", "input_ids")
    single = bool(given) and all(type(entry) is int for entry in given)
    return single, prompts_of(context, given, "input_ids")


def _asked(context: Context, body: GenerateBody, prompts: Sequence[Int32Array]) -> list[_Asked]:
    count = len(prompts)
    param = "text" if body.text is not None else "input_ids"
    sampling = _each(body.sampling_params, count, "sampling_params")
    wanted = _each(body.return_logprob, count, "return_logprob")
    starts = _each(body.logprob_start_len, count, "logprob_start_len")
    tops = _each(body.top_logprobs_num, count, "top_logprobs_num")
    probes = _probes(context, body.token_ids_logprob, count)
    rids = _each(body.rid, count, "rid")
    asked = []
    for index, ids in enumerate(prompts):
        context.check_length(ids, f"{param}[{index}]")
        logprobs = bool(wanted[index])
        one = _Asked(
            ids=ids,
            max_new=_max_new(context, sampling[index]),
            logprobs=logprobs,
            start=_start(starts[index], len(ids)) if logprobs else None,
            top=(top_of(context, tops[index], "top_logprobs_num") or 0) if logprobs else 0,
            probes=probes[index] if logprobs else None,
            rid=rids[index] or uuid.uuid4().hex,
        )
        asked.append(one)
    return asked


def _each(value: Any, count: int, param: str) -> list[Any]:
    """The value of each prompt."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise bad_request("bad_list", f"{param} has {len(value)} entries and there are {count} prompts", param)
    return value


def _probes(context: Context, value: object, count: int) -> list[Int32Array | None]:
    param = "token_ids_logprob"
    if value is None:
        return [None] * count
    shared = isinstance(value, list) and all(type(entry) is int for entry in value)
    told: list[Int32Array | None] = []
    for entry in [value] * count if shared else _each(value, count, param):
        ids = None if entry is None else context.ids(entry, param)
        if ids is not None and not 1 <= len(ids) <= context.allow.max_label_ids:
            limit = context.allow.max_label_ids
            raise bad_request("bad_choice", f"{param} has {len(ids)} ids; from 1 to {limit} are allowed", param)
        told.append(ids)
    return told


def _max_new(context: Context, params: object) -> int:
    if params is not None and not isinstance(params, dict):
        raise bad_request(
            "bad_field", "sampling_params is an object, or a list of one for each prompt", "sampling_params"
        )
    given = params or {}
    refuse_fields(given, _REFUSED_SAMPLING)
    return max_tokens_of(context, given.get("max_new_tokens"), "max_new_tokens")


def _start(value: int | None, num_tokens: int) -> int | None:
    """From where on the prompt's tokens are told; None: they are not."""
    if value is None or value == -1:
        return None
    if not 0 <= value <= num_tokens:
        raise bad_request(
            "bad_start",
            f"logprob_start_len is {value} and the prompt has {num_tokens} tokens; it is -1, or from 0 to {num_tokens}",
            "logprob_start_len",
        )
    return None if value == num_tokens else value


_Tell = Callable[[float | None, int], list[Any]]


def _teller(tokenizer: Tokenizer, with_text: bool) -> _Tell:
    def tell(logprob: float | None, token: int) -> list[Any]:
        return [logprob, token, tokenizer.token_string(token) if with_text else None]

    return tell


def _told(
    tokenizer: Tokenizer, asked: _Asked, before: Sequence[Scored], after: Scored | None, tell: _Tell
) -> dict[str, Any]:
    new = [after] if after is not None and asked.max_new else []
    meta: dict[str, Any] = {
        "id": asked.rid,
        # One token is the limit, which SGLang looks at before it looks for stops.
        "finish_reason": {"type": "length", "length": asked.max_new},
        "prompt_tokens": len(asked.ids),
        "completion_tokens": asked.max_new,
    }
    if asked.logprobs:
        meta |= _lists(asked, before, after, tell)
    texts = [tokenizer.token_string(scored.token) for scored in new if scored.token != tokenizer.eos_id]
    return {"text": "".join(texts), "output_ids": [scored.token for scored in new], "meta_info": meta}


def _lists(asked: _Asked, before: Sequence[Scored], after: Scored | None, tell: _Tell) -> dict[str, Any]:
    first = [] if asked.start is None else [tell(None, int(asked.ids[asked.start]))]
    no_list: list[None] = [] if asked.start is None else [None]
    new = [after] if after is not None else []
    lists: dict[str, Any] = {
        "input_token_logprobs": [*first, *(tell(scored.logprob, scored.token) for scored in before)],
        "output_token_logprobs": [tell(scored.logprob, scored.token) for scored in new][: asked.max_new],
    }

    def add(name: str, entries: Callable[[Scored], list[list[Any]]]) -> None:
        lists[f"input_{name}"] = [*no_list, *map(entries, before)]
        lists[f"output_{name}"] = [*map(entries, new)]

    if asked.top:
        add("top_logprobs", lambda scored: [tell(value, token) for token, value in scored.top[: asked.top]])
    if asked.probes is not None:
        ids = asked.probes.tolist()
        add("token_ids_logprobs", lambda scored: [tell(*pair) for pair in zip(scored.probed, ids, strict=True)])
    return lists
