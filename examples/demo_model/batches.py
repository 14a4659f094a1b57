"""Training batches of the demo model: texts cropped, asked about, corrupted a little, and packed by length.

Rows of similar length share a batch and are padded on the right. Under causal attention padding there changes nothing
to its left, so no attention mask is needed and the fastest attention kernel applies.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from prompts import END, KINDS, PAD, TASKS, TURN_END, ask
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

MAX_TEXT = 768  # tokens of text in a prompt
MIN_CROP = 64
POOL = 4096  # examples sorted together into batches of similar length
REVIEW_SHARE = 0.72
CHAT_SHARE = 0.3
KIND_WEIGHTS = (0.5, 0.25, 0.25)
IGNORE = -100


@dataclass(frozen=True)
class Text:
    """A tokenized text and its true label."""

    task: str
    source: str
    label: str
    ids: np.ndarray


def load(path: Path, tokenizer: Tokenizer, limit: int | None = None) -> list[Text]:
    """The texts of one split, tokenized; `limit` keeps that many of each task."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    if limit is not None:
        rows = [row for task in TASKS for row in [r for r in rows if r["task"] == task][:limit]]
    encoded = tokenizer.encode_batch_fast([row["text"] for row in rows])
    return [
        Text(row["task"], row["source"], row["label"], np.asarray(encoding.ids, dtype=np.int64))
        for row, encoding in zip(rows, encoded, strict=True)
    ]


def make_encoder(tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    """An encoder of the few recurring strings around texts, which remembers them."""

    @cache
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text).ids)

    return encode


def crop(ids: np.ndarray, rng: random.Random) -> np.ndarray:
    """The whole text, its head, or a piece from anywhere: reviews are few, and pieces of one are new texts."""
    mode = rng.random()
    length = min(len(ids), MAX_TEXT)
    if mode > 0.35 and length > MIN_CROP:
        length = round(MIN_CROP * (length / MIN_CROP) ** rng.random())
    start = rng.randrange(len(ids) - length + 1) if mode > 0.6 else 0
    return ids[start : start + length]


@dataclass(frozen=True)
class Example:
    """One training sequence. Language-model targets cover the text; the answer has its own loss."""

    inputs: np.ndarray
    targets: np.ndarray
    answer_at: int
    right: int
    answers: tuple[int, ...]


class Batches(IterableDataset[dict[str, torch.Tensor]]):
    """An endless stream of batches of about `tokens` tokens each; every worker draws its own."""

    def __init__(self, texts: list[Text], tokenizer: Tokenizer, tokens: int, seed: int, corrupt: float) -> None:
        self.texts = {task: [text for text in texts if text.task == task] for task in TASKS}
        self.tokenizer = tokenizer
        self.tokens, self.seed, self.corrupt = tokens, seed, corrupt
        self.mask, self.end, self.turn_end = (tokenizer.token_to_id(token) for token in (PAD, END, TURN_END))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        encode = make_encoder(self.tokenizer)
        while True:
            pool = sorted((self.draw(rng, encode) for _ in range(POOL)), key=lambda example: len(example.inputs))
            batches, start = [], 0
            while start < len(pool):
                stop = start + 1
                while stop < len(pool) and (stop - start + 1) * padded(len(pool[stop].inputs)) <= self.tokens:
                    stop += 1
                batches.append(pool[start:stop])
                start = stop
            rng.shuffle(batches)
            yield from map(self.collate, batches)

    def draw(self, rng: random.Random, encode: Callable[[str], tuple[int, ...]]) -> Example:
        """A random question about a random piece of a random text."""
        task = "reviews" if rng.random() < REVIEW_SHARE else "mails"
        text, chat = rng.choice(self.texts[task]), rng.random() < CHAT_SHARE
        question = ask(task, rng.choices(KINDS, KIND_WEIGHTS)[0], text.label, rng, chat)
        before, after = encode(question.before), encode(question.after)
        answers = tuple(encode(answer)[0] for answer in question.answers)
        piece = crop(text.ids, rng)
        ids = np.concatenate([before, piece, after, [answers[question.right], self.turn_end if chat else self.end]])
        start, stop = len(before), len(before) + len(piece)
        targets = np.full(len(ids) - 1, IGNORE)
        targets[start - 1 : stop - 1] = piece
        targets[-1] = ids[-1]
        inputs = ids[:-1].copy()
        if self.corrupt and rng.random() < 0.5:
            hidden = np.random.default_rng(rng.getrandbits(32)).random(len(piece)) < self.corrupt * 2 * rng.random()
            inputs[start:stop][hidden] = self.mask
        return Example(inputs, targets, len(ids) - 3, question.right, answers)

    def collate(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Right-padded tensors. Missing answer options repeat -1."""
        length = padded(max(len(example.inputs) for example in examples))
        inputs = np.full((len(examples), length), self.mask)
        targets = np.full((len(examples), length), IGNORE)
        answers = np.full((len(examples), 4), -1)
        for row, example in enumerate(examples):
            inputs[row, : len(example.inputs)] = example.inputs
            targets[row, : len(example.targets)] = example.targets
            answers[row, : len(example.answers)] = example.answers
        return {
            "inputs": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "answers": torch.from_numpy(answers),
            "lengths": torch.tensor([len(example.inputs) for example in examples]),
            "answer_at": torch.tensor([example.answer_at for example in examples]),
            "right": torch.tensor([example.right for example in examples]),
        }


def padded(length: int) -> int:
    """Lengths come in steps of 32, so that few tensor shapes occur."""
    return -(-length // 32) * 32
