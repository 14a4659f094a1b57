"""One prompt as one atomic request, and its result as log-probabilities of tokens: what OpenAI's endpoints and SGLang's
/generate share.

T tokens of the prompt, K entries of a list of most likely tokens, P probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core import AtomicRequest, AtomicResult, EngineLimits, Int32Array
from ..text import Tokenizer
from .context import Context, Plan, Results, good
from .refusals import bad_request

WHAT_THIS_IS = "this server scores prompts in one forward pass and generates at most one token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which token may be generated: ``allowed`` ids (None: any), with ``bias`` added to their logits."""

    allowed: tuple[int, ...] | None = None
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids whose logits must be known beside the most likely ones."""
        return self.allowed if self.allowed is not None else tuple(self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A token and what the model thought of its place: ``top`` are (id, log-probability) pairs, best first; ``probed``
    the log-probabilities of the question's probes.
    """

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    probed: Sequence[float] = ()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Question:
    """What is asked of one prompt, int32 [T]: its own tokens behind index ``start``, a generated token, or both.

    ``top_k`` most likely tokens are told of each place, and the ids of ``probes``, int32 [P]. Log-probabilities are the
    model's own, over the whole vocabulary; ``choice`` only says which token is generated and which ones are listed
    for it.
    """

    ids: Int32Array
    of_prompt: bool
    generate: bool
    top_k: int = 0
    choice: Choice = field(default_factory=Choice)
    logprobs: bool = True
    start: int = 0
    probes: Int32Array = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def places(self) -> int:
        """Places of the prompt of which something is asked."""
        return max(0, len(self.ids) - 1 - self.start) if self.of_prompt else 0

    def request(self, limits: EngineLimits) -> AtomicRequest | None:
        """None where nothing is asked. With the prompt alone its last token is only read as a target."""
        first, end = len(self.ids) - 1 - self.places, len(self.ids) - 1 + self.generate
        if first == end:
            return None
        own = self.ids[first + 1 :]
        before = np.concatenate([own[:, None], np.tile(self.probes, (len(own), 1))], axis=1)
        last = np.array([*self.probes, *self.choice.ids] if self.generate else (), dtype=np.int32)
        counts = [before.shape[1]] * len(own) + [len(last)] * self.generate
        top_k = min(self._top_k(), limits.vocab_size)
        return AtomicRequest(
            self.ids if self.generate else self.ids[:-1],
            np.arange(first, end, dtype=np.int32),
            np.concatenate([before.ravel(), last]),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            self.of_prompt or self.logprobs or top_k > 0,
            top_k,
        )

    def prompt_scores(self, result: AtomicResult) -> list[Scored]:
        """Of the prompt's tokens behind ``start``; empty unless ``of_prompt``."""
        places, width = self.places, 1 + len(self.probes)
        if not places:
            return []
        assert result.log_z is not None
        values = (result.logits[: places * width].reshape(places, width) - result.log_z[:places, None]).tolist()
        pairs = zip(self.ids[-places:].tolist(), values, self._tops(result), strict=False)
        return [_scored(token, own, top, probed) for token, (own, *probed), top in pairs]

    def generated(self, result: AtomicResult) -> Scored:
        """The chosen token. With ``choice.allowed`` its list holds the allowed tokens only."""
        assert self.generate
        log_z = float(result.log_z[-1]) if result.log_z is not None else 0.0
        extra = self.choice.ids
        last = (result.logits[len(result.logits) - len(extra) - len(self.probes) :] - log_z).tolist()
        probed, known = last[: len(self.probes)], dict(zip(extra, last[len(self.probes) :], strict=True))
        if self.choice.allowed is None:
            known = {**known, **dict(self._tops(result)[-1])}  # the list's values win: they are told for both
        # Of equal values the smaller id wins, as an argmax over the vocabulary has it.
        best = max(known, key=lambda token: (known[token] + self.choice.bias.get(token, 0.0), -token))
        ranked = sorted(known.items(), key=lambda pair: (-pair[1], pair[0]))
        return _scored(best, known[best], ranked[: self.top_k], probed)

    def _top_k(self) -> int:
        """Entries that are needed: those that are told, and enough to find the best one past all biased ones."""
        if self.of_prompt:
            wanted = max(self.top_k, 1)
        else:
            wanted = self.top_k if self.choice.allowed is None else 0
        if self.generate and self.choice.allowed is None:
            wanted = max(wanted, 1) + len(self.choice.bias)
        return wanted

    def _tops(self, result: AtomicResult) -> list[list[tuple[int, float]]]:
        if result.top_ids is None or result.top_logprobs is None:
            return []
        rows = zip(result.top_ids.tolist(), result.top_logprobs.tolist(), strict=True)
        return [list(zip(ids, values, strict=True)) for ids, values in rows]


def _scored(token: int, logprob: float, top: Sequence[tuple[int, float]], probed: Sequence[float]) -> Scored:
    """The token's own value and the list's are one number, and nothing is above the list's first."""
    listed = next((value for other, value in top if other == token), None)
    if listed is not None:
        logprob = listed
    elif top:
        logprob = min(logprob, top[0][1])
    return Scored(token, logprob, top, probed)


def by_text(tokenizer: Tokenizer, scored: Scored, count: int) -> dict[str, float]:
    """The ``count`` most likely tokens and the token itself, keyed by text. Of ids that read alike the better one has
    the text and the others are ``token_id:N``, so that none is lost.
    """
    named: dict[str, float] = {}
    for token, value in entries(scored, count):
        text = tokenizer.token_string(token)
        named[f"token_id:{token}" if text in named else text] = value
    return named


def entries(scored: Scored, count: int) -> list[tuple[int, float]]:
    """The ``count`` most likely tokens, then the token itself where it is not among them."""
    top = list(scored.top[:count])
    if all(token != scored.token for token, _ in top):
        top.append((scored.token, scored.logprob))
    return top


Scores = Sequence[
    tuple[Sequence[Scored], Scored | None]
]  # of each question: its prompt's tokens, and the generated one


def plan_questions(context: Context, questions: Sequence[Question], reply: Callable[[Scores], object]) -> Plan:
    """Ask all of them; ``reply`` makes the answer from their scores, in order."""
    requests = [question.request(context.limits) for question in questions]

    def finish(results: Results) -> object:
        answers = iter(good(results))
        scores: list[tuple[Sequence[Scored], Scored | None]] = []
        for question, request in zip(questions, requests, strict=True):
            if request is None:
                scores.append(([], None))
                continue
            result = next(answers)
            token = question.generated(result) if question.generate else None
            scores.append((question.prompt_scores(result), token))
        return reply(scores)

    return Plan([request for request in requests if request is not None], finish)


def max_tokens_of(context: Context, value: object, param: str) -> int:
    """0 or 1. Raises 400 for more, and where it is absent unless the server has a default."""
    if value is None:
        value = context.allow.default_max_tokens
    if value is None:
        raise bad_request(
            "max_tokens_missing", f"{WHAT_THIS_IS}: set {param} to 1, or to 0 for the prompt alone", param
        )
    if type(value) is not int or value not in (0, 1):
        told = str(value)[:40]
        raise bad_request("max_tokens_too_large", f"{param} is {told}: {WHAT_THIS_IS}; set it to 0 or 1", param)
    return value


def top_of(context: Context, value: int | None, param: str) -> int | None:
    """How many most likely tokens are told. Raises 400."""
    if value is None:
        return None
    limit = min(context.allow.max_logprobs, context.limits.vocab_size)
    if not 0 <= value <= limit:
        raise bad_request("bad_logprobs", f"{param} is {value}; it is between 0 and {limit} (--max-logprobs)", param)
    return value
