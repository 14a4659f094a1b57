"""Held-out accuracy of the demo model, for each task and form of question."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from batches import MAX_TEXT, Text, make_encoder, padded
from prompts import KINDS, TASKS, ask
from tokenizers import Tokenizer
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt, its answers' token ids, the right one, and the groups its result counts in."""

    ids: list[int]
    answers: list[int]
    right: int
    groups: tuple[str, ...]


def make_prompts(texts: list[Text], tokenizer: Tokenizer, forms: list[tuple[str, bool]], seed: int) -> list[Prompt]:
    """Every text in every (kind, chat) form, its first `MAX_TEXT` tokens at most."""
    encode, rng, prompts = make_encoder(tokenizer), random.Random(seed), []
    for text in texts:
        for kind, chat in forms:
            question = ask(text.task, kind, text.label, rng, chat)
            ids = [*encode(question.before), *text.ids[:MAX_TEXT].tolist(), *encode(question.after)]
            name = f"{text.task}/{kind}/{'chat' if chat else 'plain'}"
            groups = (name, f"{name}/{text.source}") if text.task == "reviews" else (name,)
            prompts.append(Prompt(ids, [encode(answer)[0] for answer in question.answers], question.right, groups))
    return prompts


def all_forms() -> list[tuple[str, bool]]:
    """Each kind of question, plain and as chat."""
    return [(kind, chat) for chat in (False, True) for kind in KINDS]


@torch.inference_mode()
def evaluate(model: PreTrainedModel, prompts: list[Prompt], tokens: int = 32768) -> dict[str, dict[str, float]]:
    """Per group: rows, accuracy, mean negative log-likelihood among the answers, and probability all answers get.

    The last is near one when the model answers the question at all, whichever answer it prefers.
    """
    model.eval()
    device = model.device
    ordered, start = sorted(prompts, key=lambda prompt: len(prompt.ids)), 0
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    while start < len(ordered):
        stop = start + 1
        while stop < len(ordered) and (stop - start + 1) * padded(len(ordered[stop].ids)) <= tokens:
            stop += 1
        part, start = ordered[start:stop], stop
        ids = torch.zeros(len(part), padded(len(part[-1].ids)), dtype=torch.long)
        for row, prompt in enumerate(part):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        last = torch.tensor([len(prompt.ids) - 1 for prompt in part], device=device)
        hidden = model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(part), device=device), last]).float()
        log_probs = torch.log_softmax(logits, dim=-1).cpu()
        for row, prompt in enumerate(part):
            scores = log_probs[row, prompt.answers]
            mass = torch.logsumexp(scores, dim=0)
            hit, nll = scores.argmax() == prompt.right, mass - scores[prompt.right]
            values = (1.0, float(hit), float(nll), float(mass.exp()))
            for name in prompt.groups:
                sums[name] = [total + value for total, value in zip(sums[name], values, strict=True)]
    return {
        name: {
            "rows": int(rows),
            "accuracy": round(right / rows, 4),
            "nll": round(nll / rows, 4),
            "answer_mass": round(mass / rows, 4),
        }
        for name, (rows, right, nll, mass) in sorted(sums.items())
    }


def task_accuracy(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean accuracy of each task over its forms (source groups left out)."""
    means = {}
    for task in TASKS:
        names = [name for name in results if name.startswith(f"{task}/") and name.count("/") == 2]
        values = [results[name]["accuracy"] for name in names]
        means[task] = sum(values) / len(values)
    return means
