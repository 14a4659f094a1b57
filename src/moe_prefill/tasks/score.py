"""Log-probabilities of a text: of a continuation after its context, or of a document from its first token on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core import AtomicRequest, AtomicResult, Column, EngineLimits, Int32Array, PreparedRow
from ..errors import RowError
from ..text import Tokenizer
from .base import Preview, Row
from .boundary import Split, Spot, split_spots
from .common import check_outputs, digest_of, prefixed
from .config import ScoreConfig
from .prompts import Prompter, check_vocabulary, cut_text, longest_field, too_long
from .template import Template, check_columns, columns_of, fields_of

_SUMS = (
    Column(name="logprob", kind="float"),
    Column(name="num_tokens", kind="int"),
    Column(name="tokens", kind="strings"),
    Column(name="token_logprobs", kind="floats"),
)
_TOP = (Column(name="is_greedy", kind="bool"), Column(name="top_logprobs", kind="json"))
_MAX_CUTS = 12


@dataclass(frozen=True, slots=True)
class _Text:
    """One row: the columns it reads, and what they make of it. ``context`` is None for a document."""

    fields: dict[str, str]
    context: str | None
    continuation: str


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    """Ids int32 [T] of context and continuation; those from ``start`` on are scored, those from ``first`` on listed."""

    ids: Int32Array
    start: int
    first: int


class ScoreTask:
    """Sum and list of the log-probabilities of a continuation's tokens.

    A document has no context: its first token is scored after the begin token, and stays unscored (null in the list,
    nothing in the sum) where the model has none.
    """

    name = "score"

    def __init__(
        self, config: ScoreConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._limit = limits.max_request_tokens
        self._vocab_size = limits.vocab_size
        self._continuation = Template.parse(config.continuation or f"{{{config.text_column}}}")
        self._prompter = None
        self._cuttable = columns_of([self._continuation], ())
        if config.template is not None:
            self._prompter = Prompter(config, Template.parse(config.template), tokenizer, limits)
            self._cuttable = columns_of([self._prompter.template], ())
        self.placeholders = self._cuttable | columns_of([self._continuation], ())
        self.columns = prefixed((*_SUMS, *(_TOP if config.top_k else ())), config.output_prefix)
        self.answer_column = self.columns[0].name
        source = f"{config.template}\0{self._continuation.source}"
        self.digest = digest_of(self.name, config, source, tokenizer, self._prompter, limits)
        check_columns(self.placeholders, columns)
        check_outputs(self.columns, columns)

    def prepare(self, rows: Sequence[Row]) -> list[PreparedRow | RowError]:
        texts = [self._text(row) for row in rows]
        scored = iter(self._encode([text for text in texts if isinstance(text, _Text)]))
        return [text if isinstance(text, RowError) else self._fit(text, next(scored)) for text in texts]

    def finish(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> dict[str, object]:
        (request,), (result,), scored = prepared.requests, results, _state(prepared)
        logprobs = result.logprobs(request)
        listed = [None] * (scored.start - scored.first) + logprobs.tolist()
        tokens = [self._tokenizer.token_string(token) for token in scored.ids[scored.first :].tolist()]
        values: list[object] = [float(logprobs.sum(dtype=np.float64)), len(logprobs), tokens, listed]
        if self._config.top_k:
            values += [is_greedy(request, result), top_lists(result)]
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}

    def notes(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> tuple[str, ...]:
        return ()

    def preview(self, prepared: PreparedRow) -> list[Preview]:
        scored = _state(prepared)
        return [Preview(scored.ids[: scored.start], (("continuation", tuple(scored.ids[scored.start :].tolist())),))]

    def _text(self, row: Row) -> _Text | RowError:
        try:
            return self._rendered(fields_of(row, self.placeholders))
        except RowError as error:
            return error.kept()

    def _rendered(self, fields: dict[str, str]) -> _Text:
        continuation = (self._config.label_prefix or "") + self._continuation.render(fields)
        context = None if self._prompter is None else self._prompter.context(fields)
        return _Text(fields, context, continuation)

    def _encode(self, texts: Sequence[_Text]) -> list[_Scored | RowError]:
        spots = [Spot(text.context, (text.continuation,)) for text in texts if text.context]
        documents = [text.continuation for text in texts if not text.context]
        add_bos = self._prompter is None or self._prompter.chat is None
        splits = iter(split_spots(self._tokenizer, spots, self._config.boundary, add_bos=add_bos))
        encoded = iter(self._tokenizer.encode_batch(documents))
        scored: list[_Scored | RowError] = []
        for text in texts:
            if not text.context:
                scored.append(self._document(next(encoded)))
                continue
            split = next(splits)
            scored.append(split if isinstance(split, RowError) else _joined(split))
        return scored

    def _document(self, ids: Int32Array) -> _Scored:
        begin = len(self._tokenizer.prefix_ids)
        return _Scored(ids, max(begin, 1), begin)

    def _fit(self, text: _Text, scored: _Scored | RowError) -> PreparedRow | RowError:
        try:
            notes: tuple[str, ...] = ()
            for _ in range(_MAX_CUTS):
                if isinstance(scored, RowError):
                    raise scored
                excess = len(scored.ids) - 1 - self._limit
                if excess <= 0:
                    return self._prepared(scored, notes)
                text, notes = self._shorten(text, excess), ("truncated",)
                scored = self._encode([text])[0]
            raise too_long(excess + self._limit, self._limit, self._config.truncate)
        except RowError as error:
            return error.kept()

    def _shorten(self, text: _Text, excess: int) -> _Text:
        """Cut the context's texts, or the document itself; a continuation after a context is never cut."""
        side = self._config.truncate
        name, spans = longest_field(self._tokenizer, {key: text.fields[key] for key in sorted(self._cuttable)})
        if side == "error" or len(spans) <= excess:
            raise too_long(excess + self._limit, self._limit, side)
        return self._rendered({**text.fields, name: cut_text(text.fields[name], spans, excess, side)})

    def _prepared(self, scored: _Scored, notes: tuple[str, ...]) -> PreparedRow:
        if scored.start >= len(scored.ids):
            raise RowError(
                "nothing_to_score",
                "no token of the text has another one before it; give a context, or a text of two tokens or more",
            )
        check_vocabulary(scored.ids, self._tokenizer, self._vocab_size)
        request = AtomicRequest.continuation(scored.ids, scored.start, top_k=self._config.top_k)
        return PreparedRow((request,), scored, notes)


def _joined(split: Split) -> _Scored:
    ids = np.concatenate([split.context, np.array(split.labels[0], dtype=np.int32)])
    return _Scored(ids, len(split.context), len(split.context))


def is_greedy(request: AtomicRequest, result: AtomicResult) -> bool:
    """Whether every asked token is a most likely one. Needs one id a position and ``top_k``."""
    assert result.top_ids is not None, "the request did not ask for the most likely tokens"
    assert result.top_logprobs is not None
    # A tie is greedy too: its value equals the best one.
    best = (result.top_ids[:, 0] == request.ids) | (result.logprobs(request) >= result.top_logprobs[:, 0])
    return bool(best.all())


def top_lists(result: AtomicResult) -> list[list[list[object]]]:
    """For each asked position its most likely tokens as [id, log-probability] pairs, best first."""
    assert result.top_ids is not None, "the request did not ask for the most likely tokens"
    assert result.top_logprobs is not None
    return [
        [[token, value] for token, value in zip(ids, values, strict=True)]
        for ids, values in zip(result.top_ids.tolist(), result.top_logprobs.tolist(), strict=True)
    ]


def _state(prepared: PreparedRow) -> _Scored:
    assert isinstance(prepared.state, _Scored), type(prepared.state)
    return prepared.state
