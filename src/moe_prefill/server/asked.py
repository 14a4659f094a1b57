"""One prompt as one atomic request, and its result as log-probabilities of tokens: what both OpenAI endpoints share.

T tokens of the prompt, K entries of a list of most likely tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core import AtomicRequest, AtomicResult, EngineLimits, Int32Array
from ..text import Tokenizer


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
    """A token and what the model thought of its place: ``top`` are (id, log-probability) pairs, best first."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Question:
    """What is asked of one prompt, int32 [T]: its own tokens from the second on, a generated token, or both.

    ``top_k`` most likely tokens are told of each place. Log-probabilities are the model's own, over the whole
    vocabulary; ``choice`` only says which token is generated and which ones are listed for it.
    """

    ids: Int32Array
    of_prompt: bool
    generate: bool
    top_k: int = 0
    choice: Choice = field(default_factory=Choice)
    logprobs: bool = True

    def request(self, limits: EngineLimits) -> AtomicRequest | None:
        """None where nothing is asked. With the prompt alone its last token is only read as a target."""
        places = len(self.ids) - 1 if self.of_prompt else 0
        positions = list(range(places)) + [len(self.ids) - 1] * self.generate
        if not positions:
            return None
        tokens = self.ids if self.generate else self.ids[:-1]
        last = np.array(self.choice.ids if self.generate else (), dtype=np.int32)
        counts = [1] * places + [len(last)] * self.generate
        top_k = min(self._top_k(), limits.vocab_size)
        return AtomicRequest(
            tokens,
            np.array(positions, dtype=np.int32),
            np.concatenate([self.ids[1 : places + 1], last]),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            self.of_prompt or self.logprobs or top_k > 0,
            top_k,
        )

    def prompt_scores(self, result: AtomicResult) -> list[Scored]:
        """Of the prompt's tokens from the second on; empty unless ``of_prompt``."""
        places = len(self.ids) - 1 if self.of_prompt else 0
        if not places:
            return []
        assert result.log_z is not None
        own = (result.logits[:places] - result.log_z[:places]).tolist()
        tops = self._tops(result)
        return [_scored(token, lp, top) for token, lp, top in zip(self.ids[1:].tolist(), own, tops, strict=False)]

    def generated(self, result: AtomicResult) -> Scored:
        """The chosen token. With ``choice.allowed`` its list holds the allowed tokens only."""
        assert self.generate
        log_z = float(result.log_z[-1]) if result.log_z is not None else 0.0
        extra = self.choice.ids
        known = dict(zip(extra, (result.logits[len(result.logits) - len(extra) :] - log_z).tolist(), strict=True))
        if self.choice.allowed is None:
            known = {**known, **dict(self._tops(result)[-1])}  # the list's values win: they are told for both
        # Of equal values the smaller id wins, as an argmax over the vocabulary has it.
        best = max(known, key=lambda token: (known[token] + self.choice.bias.get(token, 0.0), -token))
        ranked = sorted(known.items(), key=lambda pair: (-pair[1], pair[0]))
        return _scored(best, known[best], ranked[: self.top_k])

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


def _scored(token: int, logprob: float, top: Sequence[tuple[int, float]]) -> Scored:
    """The token's own value and the list's are one number, and nothing is above the list's first."""
    listed = next((value for other, value in top if other == token), None)
    if listed is not None:
        logprob = listed
    elif top:
        logprob = min(logprob, top[0][1])
    return Scored(token, logprob, top)


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
