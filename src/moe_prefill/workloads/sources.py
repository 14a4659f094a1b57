"""Requests like those of the paper's data sets (Table 2): their number, lengths, totals and what they share.

Token ids are random; what is shared is equal. ``scale`` makes a data set smaller and keeps its lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..core import AtomicRequest, Int32Array
from .lengths import skewed_lengths, spread_lengths
from .workload import Rng

VOCAB_SIZE = 151_936  # Qwen3's
_FIRST_TOKEN = 1000

Source = Callable[[Rng, float], list[AtomicRequest]]


def quality(rng: Rng, scale: float) -> list[AtomicRequest]:
    """Questions on long passages: 68 passages of 8.6K tokens on average, 17 or 18 questions each; 4K to 12K tokens."""
    passages = _scaled(68, scale)
    questions = _scaled(1200, passages / 68)
    counts = np.full(passages, questions // passages)
    counts[: questions - counts.sum()] += 1
    texts = _texts(rng, spread_lengths(rng, passages, 3900, 11700, 8600 * passages))
    prompt_tokens = int(10_500_000 * questions / 1200)
    rest = prompt_tokens - int(sum(len(text) * count for text, count in zip(texts, counts, strict=True)))
    asked = iter(_texts(rng, spread_lengths(rng, questions, 40, 300, min(max(rest, 60 * questions), 280 * questions))))
    return [
        _choice(np.concatenate([text, next(asked)]), 4)
        for text, count in zip(texts, counts.tolist(), strict=True)
        for _ in range(count)
    ]


def arxiv(rng: Rng, scale: float, *, pairs: bool = True) -> list[AtomicRequest]:
    """Long papers, 6K to 128K tokens: 600 requests over 420 papers, 180 of them twice (``pairs``), or over 600."""
    requests, question = _scaled(600, scale), 40
    twice = min(round(180 * scale), requests // 3) if pairs else 0
    tokens = 10_100_000 * requests // 600 - question * requests
    low, high = 6000 - question, 128_000 - question
    of_pairs = tokens // requests * twice
    lengths = skewed_lengths(rng, requests - 2 * twice, low, high, tokens - 2 * of_pairs)
    papers = _texts(rng, lengths)
    papers += 2 * _texts(rng, skewed_lengths(rng, twice, low, high, of_pairs)) if twice else []
    asked = _texts(rng, np.full(requests, question))
    return [_choice(np.concatenate([paper, text]), 8) for paper, text in zip(papers, asked, strict=True)]


def moral_stories(rng: Rng, scale: float) -> list[AtomicRequest]:
    """12K short stories with two endings each, behind an instruction of 40 tokens; 100 to 200 tokens."""
    stories = _scaled(12_000, scale)
    instruction = _text(rng, 40)
    lengths = spread_lengths(rng, 2 * stories, 100, 200, 3_300_000 * stories // 12_000)
    begin = np.minimum(lengths[::2], lengths[1::2]) - 40 - rng.integers(12, 28, stories)
    texts, endings = _texts(rng, begin), iter(_texts(rng, lengths - 40 - np.repeat(begin, 2)))
    return [_choice(np.concatenate([instruction, text, next(endings)]), 2) for text in texts for _ in range(2)]


def mmlu(rng: Rng, scale: float) -> list[AtomicRequest]:
    """24K questions under 57 subject headers of 25 tokens; 50 to 500 tokens."""
    requests = _scaled(24_000, scale)
    headers = _texts(rng, np.full(57, 25))
    texts = _texts(rng, spread_lengths(rng, requests, 50, 500, 5_800_000 * requests // 24_000) - 25)
    subjects = rng.integers(0, 57, requests).tolist()
    return [_choice(np.concatenate([headers[s], text]), 4) for s, text in zip(subjects, texts, strict=True)]


def boolq(rng: Rng, scale: float) -> list[AtomicRequest]:
    """12K questions with a passage of their own behind an instruction of 30 tokens; 200 to 600 tokens."""
    return _behind_instruction(rng, _scaled(12_000, scale), 30, 200, 600, 225)


def imdb(rng: Rng, scale: float) -> list[AtomicRequest]:
    """12K reviews behind an instruction of 30 tokens; 300 to 2,000 tokens."""
    return _behind_instruction(rng, _scaled(12_000, scale), 30, 300, 2000, 5_500_000 / 12_000)


def hot_prefix(rng: Rng, scale: float) -> list[AtomicRequest]:
    """20K requests that all share a prefix of 4,096 tokens, with 64 to 512 of their own."""
    return _behind_instruction(rng, _scaled(20_000, scale), 4096, 4160, 4608, 4288)


def hot_few(rng: Rng, scale: float) -> list[AtomicRequest]:
    """64 requests, at any scale, that share a prefix of 4,096 tokens, with 64 to 512 of their own."""
    return _behind_instruction(rng, 64, 4096, 4160, 4608, 4288)


def unshared(rng: Rng, scale: float) -> list[AtomicRequest]:
    """8K requests of 256 to 8,192 tokens that share nothing."""
    return _behind_instruction(rng, _scaled(8_000, scale), 0, 256, 8192, 2048)


def _behind_instruction(
    rng: Rng, requests: int, instruction: int, low: int, high: int, mean: float
) -> list[AtomicRequest]:
    shared = _text(rng, instruction)
    texts = _texts(rng, spread_lengths(rng, requests, low, high, round(mean * requests)) - instruction)
    return [_choice(np.concatenate([shared, text]), 2) for text in texts]


def _scaled(count: int, scale: float) -> int:
    return max(2, round(count * scale))


def _text(rng: Rng, tokens: int) -> Int32Array:
    return rng.integers(_FIRST_TOKEN, VOCAB_SIZE, tokens, dtype=np.int32)


def _texts(rng: Rng, lengths: np.ndarray) -> list[Int32Array]:
    return np.split(_text(rng, int(lengths.sum())), np.cumsum(lengths)[:-1])


def _choice(tokens: Int32Array, candidates: int) -> AtomicRequest:
    """Which of a few single tokens comes next."""
    return AtomicRequest.candidates(tokens, np.arange(candidates, dtype=np.int32))


def shuffled(rng: Rng, parts: Sequence[tuple[str, list[AtomicRequest]]]) -> tuple[list[AtomicRequest], list[str]]:
    """All requests in random order, with the name of each one's data set."""
    requests = [request for _, part in parts for request in part]
    sources = [name for name, part in parts for _ in part]
    order = rng.permutation(len(requests)).tolist()
    return [requests[index] for index in order], [sources[index] for index in order]
