"""From a row's texts to prompts with labels: template, chat template, token boundary, length.

A prompt that is too long is cut only on request, and never in its instructions: tokens go from the longest of the row's
own texts until the prompt fits, at its left end, right end or middle.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..core import AtomicRequest, EngineLimits, Int32Array
from ..errors import RowError, TaskError
from ..text import ChatTemplate, Tokenizer
from .boundary import Split, Spot, split_spots
from .config import TaskConfig, Truncate
from .labels import LabelPlan, check_labels, plan_labels
from .template import Template

_PREFIX_REMEDY = "rename one, or close every label with --label-end (for example '\\n' or '<eos>')"
_PART_CHARS = 1 << 23  # of prompts whose texts are held at a time
_MAX_CUTS = 12  # each round removes the excess counted by the last one; texts that need more are given up


@dataclass(frozen=True, slots=True)
class Ask:
    """What one row asks: its ``fields``, further fields for each of its prompts, and the labels of every prompt."""

    fields: Mapping[str, str]
    variants: tuple[Mapping[str, str], ...]
    names: tuple[str, ...]
    labels: tuple[str, ...]  # texts, without their prefix
    cuttable: frozenset[str]  # the fields that may be shortened
    items: tuple[str, ...] = ()  # the row's options or candidates, for the task to name in its answer


@dataclass(frozen=True, eq=False)  # no slots: of what is computed once
class Asked:
    """Prompts of one row, ready: for each variant its ids, its plan and its requests."""

    splits: tuple[Split, ...]
    plans: tuple[LabelPlan, ...]
    notes: tuple[str, ...]

    @functools.cached_property
    def requests(self) -> tuple[tuple[AtomicRequest, ...], ...]:
        """Made when they are asked for: those of many labels hold the context as often, also where it is too long."""
        return tuple(plan.requests(split.context) for plan, split in zip(self.plans, self.splits, strict=True))

    @property
    def all_requests(self) -> tuple[AtomicRequest, ...]:
        return tuple(request for group in self.requests for request in group)


class Prompter:
    """Makes the prompts of a task. ``vocabulary`` asks for log-probabilities over the whole vocabulary."""

    def __init__(
        self,
        config: TaskConfig,
        template: Template,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        *,
        label_end: str | None = None,
        vocabulary: bool = False,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.config = config
        self.chat = chat_template_of(config, tokenizer)
        self.label_prefix = _label_prefix(config, template)
        self._limit = limits.max_request_tokens
        self._vocab_size = limits.vocab_size
        self._vocabulary = vocabulary
        self._end_text, self._end_ids = _label_end(label_end, tokenizer)

    def context(self, fields: Mapping[str, str]) -> str:
        """The text before the labels. Raises RowError where the chat template refuses it."""
        text = self.template.render(fields)
        return text if self.chat is None else self.chat.render(text, self.config.system)

    def ask(self, asks: Sequence[Ask | RowError]) -> list[Asked | RowError]:
        """Prepare a batch of rows, in order; a row that cannot be asked gives its error. Of rows with many or long
        prompts a few are worked on at a time, for their texts need more memory than their ids.
        """
        asked: list[Asked | RowError] = []
        held: list[tuple[Ask, list[Spot]] | RowError] = []
        chars = 0
        for ask in asks:
            spots = self._spots(ask)
            if isinstance(spots, RowError) or isinstance(ask, RowError):
                assert isinstance(spots, RowError), spots
                held.append(spots)
                continue
            held.append((ask, spots))
            chars += sum(len(spot.context) for spot in spots)
            if chars > _PART_CHARS:
                asked += self._asked_part(held)
                held, chars = [], 0
        return asked + self._asked_part(held)

    def _asked_part(self, held: Sequence[tuple[Ask, list[Spot]] | RowError]) -> list[Asked | RowError]:
        splits = iter(self._split([spot for one in held if not isinstance(one, RowError) for spot in one[1]]))
        return [one if isinstance(one, RowError) else self._fit(one[0], [next(splits) for _ in one[1]]) for one in held]

    def check(self, ask: Ask) -> None:
        """Raise TaskError for what would fail in every row: labels that clash, or merge with the template's own end."""
        spots = self._spots(ask)
        if isinstance(spots, RowError):
            raise TaskError(str(spots))
        for split in self._split(spots):
            if not isinstance(split, RowError):
                check_labels(self._closed(split).labels, ask.names, _PREFIX_REMEDY)
                self._check_ids(split)
            elif self.chat is not None or self.template.literals[-1].strip():
                raise TaskError(str(split))

    def _spots(self, ask: Ask | RowError) -> list[Spot] | RowError:
        if isinstance(ask, RowError):
            return ask
        try:
            return self._spots_or_raise(ask)
        except RowError as error:
            return error.kept()

    def _spots_or_raise(self, ask: Ask) -> list[Spot]:
        contexts = [self.context({**ask.fields, **variant}) for variant in ask.variants]
        shared = common_length(contexts) if len(contexts) > 1 else 0
        labels = tuple(self.label_prefix + label + self._end_text for label in ask.labels)
        return [Spot(context, labels, min(shared, len(context))) for context in contexts]

    def _split(self, spots: Sequence[Spot]) -> list[Split | RowError]:
        # A chat template writes its own begin token, or means that there is none.
        return split_spots(self.tokenizer, spots, self.config.boundary, add_bos=self.chat is None)

    def _fit(self, ask: Ask, splits: Sequence[Split | RowError]) -> Asked | RowError:
        """Answer with requests, after cutting the row's texts where that is needed and allowed."""
        try:
            notes: tuple[str, ...] = ()
            for _ in range(_MAX_CUTS):
                asked = self._asked(ask, splits, notes)
                excess = max(self._excess(asked))
                if excess <= 0:
                    return asked
                ask = self._shorten(ask, asked, excess)
                notes = ("truncated",)
                splits = self._split(self._spots_or_raise(ask))
            raise too_long(excess + self._limit, self._limit, self.config.truncate)
        except RowError as error:
            return error.kept()

    def _asked(self, ask: Ask, splits: Sequence[Split | RowError], notes: tuple[str, ...]) -> Asked:
        closed = []
        for split in splits:
            if isinstance(split, RowError):
                raise split
            check_vocabulary(split.context, self.tokenizer, self._vocab_size)
            closed.append(self._closed(split))
        plans = [self._plan(split, ask.names) for split in closed]
        return Asked(tuple(closed), tuple(plans), notes)

    def _closed(self, split: Split) -> Split:
        if not self._end_ids:
            return split
        return replace(split, labels=tuple(label + self._end_ids for label in split.labels))

    def _plan(self, split: Split, names: Sequence[str]) -> LabelPlan:
        try:
            check_labels(split.labels, names, _PREFIX_REMEDY)
            self._check_ids(split)
        except TaskError as error:
            raise RowError("label_clash", str(error)) from error
        return plan_labels(split.labels, self._vocabulary)

    def _check_ids(self, split: Split) -> None:
        largest = max((token for label in split.labels for token in label), default=0)
        if largest >= self._vocab_size:
            raise TaskError(
                f"the tokenizer makes id {largest} of a label, but the model has {self._vocab_size} tokens: "
                "tokenizer and model do not belong together"
            )

    def _excess(self, asked: Asked) -> list[int]:
        pairs = zip(asked.splits, asked.plans, strict=True)
        return [len(split.context) + plan.longest - self._limit for split, plan in pairs]

    def _shorten(self, ask: Ask, asked: Asked, excess: int) -> Ask:
        """Take ``excess`` tokens from the longest text of the longest prompt.

        A text that all prompts of the row share is cut once for all, so that they go on sharing it; where a candidate
        is the longest text, each prompt that is too long loses tokens of its own candidate.
        """
        side = self.config.truncate
        by_variant = self._excess(asked)
        worst = by_variant.index(excess)
        name, spans = self._longest(ask, worst)
        if side == "error" or len(spans) <= excess:
            raise too_long(excess + self._limit, self._limit, side)
        if name in ask.fields:
            return replace(ask, fields={**ask.fields, name: cut_text(ask.fields[name], spans, excess, side)})
        variants = list(ask.variants)
        for i, own in enumerate(by_variant):
            spans = self.tokenizer.offsets(variants[i][name])
            if 0 < own < len(spans):
                variants[i] = {**variants[i], name: cut_text(variants[i][name], spans, own, side)}
        return replace(ask, variants=tuple(variants))

    def _longest(self, ask: Ask, variant: int) -> tuple[str, list[tuple[int, int]]]:
        fields = {**ask.fields, **ask.variants[variant]}
        return longest_field(self.tokenizer, {name: fields[name] for name in sorted(ask.cuttable & set(fields))})


def chat_template_of(config: TaskConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The model's chat template where the task asks for it. Raises ModelError and UsageError."""
    if not config.chat:
        return None
    return ChatTemplate.of(tokenizer.chat_template, tokenizer.special_tokens, config.chat_date)


def common_length(texts: Sequence[str]) -> int:
    """Characters that all texts begin with alike; bisection, so that the comparing is done by the interpreter."""
    first, last = min(texts), max(texts)
    low, high = 0, min(len(first), len(last))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == last[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def longest_field(tokenizer: Tokenizer, fields: Mapping[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """The field of most tokens, with their character ranges; the first by name among equals."""
    spans = {name: tokenizer.offsets(text) for name, text in fields.items()}
    if not spans:
        return "", []
    name = max(spans, key=lambda key: len(spans[key]))
    return name, spans[name]


def cut_text(text: str, spans: Sequence[tuple[int, int]], excess: int, side: Truncate) -> str:
    """Remove ``excess`` tokens: the first ones ("left"), the last ones ("right") or those around the middle."""
    keep = len(spans) - excess
    assert 0 < keep < len(spans), (keep, len(spans))
    if side == "left":
        return text[spans[excess][0] :]
    if side == "right":
        return text[: spans[keep][0]]
    head = keep // 2
    return text[: spans[head][0]] + text[spans[head + excess][0] :]


def check_vocabulary(ids: Int32Array, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise RowError for ids that the model does not have; possible only where its tokenizer has more of them."""
    if tokenizer.vocab_size > vocab_size and len(ids) and int(ids.max()) >= vocab_size:
        token = int(ids.max())
        raise RowError(
            "bad_ids",
            f"the text holds the token {tokenizer.token_string(token)!r} with id {token}, but the model's ids end at "
            f"{vocab_size - 1}; take that token out of the text",
        )


def too_long(count: int, limit: int, truncate: Truncate) -> RowError:
    """The error of a prompt of ``count`` tokens where ``limit`` fit."""
    remedy = (
        "shorten it, or let it be cut (truncate: left, right or middle)"
        if truncate == "error"
        else "cutting the row's longest text does not bring it below the limit; shorten the template"
    )
    return RowError("too_long", f"the prompt has {count} tokens and the longest request is {limit}: {remedy}")


def _label_prefix(config: TaskConfig, template: Template) -> str:
    if config.label_prefix is not None:
        return config.label_prefix
    return "" if config.chat or template.ends_with_space else " "


def _label_end(label_end: str | None, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
    if label_end != "<eos>":
        return label_end or "", ()
    if tokenizer.eos_id is None:
        raise TaskError("label_end is <eos>, but the model's tokenizer names no end token; use a text such as '\\n'")
    return "", (tokenizer.eos_id,)
