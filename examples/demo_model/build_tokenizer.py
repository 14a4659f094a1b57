"""Train the demo model's byte-level BPE tokenizer on the train split.

Why its own: a published tokenizer of 150,000 tokens would spend the whole parameter budget on embeddings.

    python examples/demo_model/build_tokenizer.py --data build/demo_data --out build/demo_data

Writes tokenizer.json and tokenizer_config.json (with a ChatML template), as `AutoTokenizer.from_pretrained` reads them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

from prompts import ANSWERS, CHAT_TEMPLATE, END, KINDS, PAD, TASKS, TURN, TURN_END, ask
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

QUESTIONS = 4000  # rounds of questions in the training text: enough for every answer to become one token


def corpus(path: Path) -> Iterator[str]:
    """Texts of the split, then questions with their answers, as the model will see them."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)["text"]
    rng = random.Random(0)
    for _ in range(QUESTIONS):
        for task, labels in TASKS.items():
            for chat in (False, True):
                question = ask(task, rng.choice(KINDS), rng.choice(labels), rng, chat)
                yield question.before + question.after + question.answers[question.right]
        yield from ANSWERS
        yield from (f" {answer}" for answer in ANSWERS)


def build(path: Path, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, special ones included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, TURN, TURN_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(path), trainer)
    return tokenizer


def main() -> None:
    """Train, check that every answer is one token, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare_data.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=8192)
    args = parser.parse_args()
    tokenizer = build(args.data / "train.jsonl.gz", args.vocab_size)
    for answer in ANSWERS:
        for spelled in (answer, f" {answer}"):
            if len(tokenizer.encode(spelled).ids) != 1:
                raise SystemExit(f"{spelled!r} is not one token: raise QUESTIONS or --vocab-size")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [TURN, TURN_END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
