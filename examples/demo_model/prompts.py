"""The prompts of the demo model: one place for training, evaluation and whoever wants to score with it.

Every prompt is a text followed by a question, and ends where the answer is the next token. Texts come first, so that
several questions about one text share its prefix. The chat form wraps the same question in turns.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

TASKS: dict[str, tuple[str, ...]] = {"mails": ("spam", "ham"), "reviews": ("positive", "negative")}
NOUNS = {"mails": "mail", "reviews": "review"}
KINDS = ("classify", "letters", "binary")
LETTERS = "ABCD"
ANSWERS = ("spam", "ham", "positive", "negative", "yes", "no", *LETTERS)
END, TURN, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Question:
    """What stands before and after a text, the answers it allows, and which of them is right."""

    before: str
    after: str
    answers: tuple[str, ...]
    right: int


def ask(task: str, kind: str, label: str, rng: random.Random, chat: bool = False) -> Question:
    """A question of `kind` about a text of `task` whose true label is `label`.

    `rng` picks what must not carry the answer: the order of lettered options and the label a binary question names.
    """
    noun, labels = NOUNS[task], TASKS[task]
    if kind == "classify":
        question = f"Is this {noun} {labels[0]} or {labels[1]}?"
        answers, right = labels, labels.index(label)
    elif kind == "letters":
        options = list(labels)
        if rng.random() < 0.25:
            options += [other for name, others in TASKS.items() if name != task for other in others]
        rng.shuffle(options)
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        question = f"Which label fits this {noun}?\n{lines}"
        answers, right = tuple(LETTERS[: len(options)]), options.index(label)
    elif kind == "binary":
        asked = rng.choice(labels)
        question = f'Does the label "{asked}" apply?'
        answers, right = ("yes", "no"), int(asked != label)
    else:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    before, after = f"{noun.capitalize()}:\n", f"\n\nQuestion: {question}"
    if chat:
        return Question(f"{TURN}user\n{before}", f"{after}{TURN_END}\n{TURN}assistant\n", answers, right)
    return Question(before, f"{after}\nAnswer:", tuple(f" {answer}" for answer in answers), right)
