"""What every endpoint may read: tokenizer, limits, served names, and the tasks that the operator has set."""

from __future__ import annotations

import datetime
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..core import AtomicRequest, AtomicResult, EngineLimits, Int32Array
from ..tasks import ClassifyConfig, RankConfig, Task, TaskConfig, build_task
from ..text import ChatTemplate, Tokenizer
from .refusals import Refused, bad_request, too_many
from .settings import V1Rerank

Results = Sequence[AtomicResult | Exception]
_TASKS_KEPT = 256


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A body turned into atomic requests; ``finish`` makes the reply (plain JSON values) from their results."""

    requests: Sequence[AtomicRequest]
    finish: Callable[[Results], object]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowances:
    """What one request may ask."""

    max_rows: int = 2048  # texts, documents, prompts or rows
    max_logprobs: int = 20
    max_label_ids: int = 4096
    default_max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """The model as the endpoints see it. Used by several threads; nothing in it changes but the cache of tasks.

    ``names`` are the accepted model names, the first is told; ``*`` accepts any. ``rerank`` and ``classify`` are the
    tasks behind endpoints whose bodies have no prompt of their own.
    """

    tokenizer: Tokenizer
    limits: EngineLimits
    names: tuple[str, ...]
    allow: Allowances = field(default_factory=Allowances)
    rerank: RankConfig = field(default_factory=lambda: RankConfig(candidates_column="documents", text_column="query"))
    classify: ClassifyConfig | None = None
    v1_rerank: V1Rerank = "vllm"  # whose reply /v1/rerank gives
    created: int = 0  # seconds since 1970

    @property
    def name(self) -> str:
        return self.names[0]

    def check_model(self, name: str | None) -> None:
        if name is None or name in self.names or "*" in self.names:
            return
        raise Refused(
            404,
            "model_not_found",
            f"this server has no model {name!r}; it serves {', '.join(self.names)}",
            param="model",
        )

    def task(self, config: TaskConfig, max_tokens: int | None = None) -> Task:
        """The task, checked against the tokenizer; kept for the next request. Raises TaskError."""
        limits = self.limits
        if config.chat and config.chat_date is None:
            config = replace(config, chat_date=datetime.date.today().isoformat())
        if max_tokens is not None:
            limits = replace(limits, max_request_tokens=min(max_tokens, limits.max_request_tokens))
        return self._tasks(config, limits)

    @functools.cached_property
    def _tasks(self) -> Callable[[TaskConfig, EngineLimits], Task]:
        lock = threading.Lock()
        build = functools.lru_cache(maxsize=_TASKS_KEPT)(
            lambda config, limits: build_task(config, self.tokenizer, limits)
        )

        def of(config: TaskConfig, limits: EngineLimits) -> Task:
            with lock:  # a task is built in milliseconds; two threads need not build the same one
                return build(config, limits)

        return of

    def chat(self) -> ChatTemplate:
        """The model's chat template, with today's date."""
        return self._chats(datetime.date.today().isoformat())

    @functools.cached_property
    def _chats(self) -> Callable[[str], ChatTemplate]:
        of, tokenizer = ChatTemplate.of, self.tokenizer
        return functools.lru_cache(maxsize=1)(lambda date: of(tokenizer.chat_template, tokenizer.special_tokens, date))

    def check_rows(self, count: int, what: str) -> None:
        if not count:
            raise bad_request("empty", f"{what} is empty; at least one is needed", what)
        if count > self.allow.max_rows:
            raise too_many(f"{what} has {count} entries, the limit of one request is {self.allow.max_rows}", what)

    def check_length(self, ids: Int32Array, param: str) -> Int32Array:
        """Raise 400 for an empty or too long prompt; nothing is ever cut without being asked."""
        limit = self.limits.max_request_tokens
        if not len(ids):
            raise bad_request("empty_text", f"{param} has no token; a prompt needs at least one", param)
        if len(ids) > limit:
            raise bad_request(
                "context_length_exceeded",
                f"{param} has {len(ids)} tokens and the longest request is {limit}; shorten it",
                param,
            )
        return ids

    def ids(self, values: object, param: str) -> Int32Array:
        """Token ids from JSON, int32 [T]. Raises 400 for what is no id of the model."""
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise bad_request("bad_ids", f"{param} needs a list of token ids (whole numbers)", param)
        if values and (min(values) < 0 or max(values) >= self.limits.vocab_size):
            worst = min(values) if min(values) < 0 else max(values)
            raise bad_request(
                "bad_ids", f"{param} has the id {worst}; the model's ids are 0 to {self.limits.vocab_size - 1}", param
            )
        return np.array(values, dtype=np.int32)

    def encode(self, texts: Sequence[str], param: str, *, add_special_tokens: bool = True) -> list[Int32Array]:
        """Ids of texts. Raises 400 for ids that the model does not have."""
        rows = self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        for row in rows:
            if len(row) and int(row.max()) >= self.limits.vocab_size:
                raise bad_request(
                    "bad_ids", f"{param} has a token that the model does not have: {int(row.max())}", param
                )
        return rows


def good(results: Results) -> list[AtomicResult]:
    """The results, where one failing request fails the whole body. Raises the first error."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if isinstance(result, AtomicResult)]


def usage(prompt_tokens: int, completion_tokens: int = 0) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
