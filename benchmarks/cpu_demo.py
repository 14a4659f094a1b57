"""The demo model on a CPU beside transformers: same prompts, same precision, one run.

    python benchmarks/cpu_demo.py --out benchmarks/results/cpu_demo.json

Two workloads. Without sharing: the shipped mails as classify prompts (sharing off on our side), one candidate set
each. With sharing: contexts of 512 tokens with 8 continuations of 16 tokens each. transformers may choose: every
experts implementation it has for CPUs and several batch sizes are tried, sorted by length and padded,
`logits_to_keep=1`; the best counts. Its variant with a hand-made prefix cache is reported beside. The two sides
alternate, each warmed up, and the median counts. Each has a process of its own, since our engine tells the allocator to
keep freed memory, which is part of what it does, and which transformers does not do.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moe_prefill import Engine
from moe_prefill.core import AtomicRequest, Int32Array

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/demo_model/checkpoint"
MAILS = ROOT / "examples/data/mails.csv"
PROMPT = "Mail:\n{text}\n\nQuestion: Is this mail spam or ham?\nAnswer:"
CONTEXT, SIBLINGS, TAIL = 512, 8, 16
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # what transformers has for CPUs


def mail_prompts(engine: Engine, count: int) -> list[Int32Array]:
    with MAILS.open(newline="", encoding="utf-8") as lines:
        texts = [PROMPT.format(text=row["text"]) for row in csv.DictReader(lines)]
    return list(engine.tokenizer.encode_batch(texts[:count]))


def sibling_prompts(vocab: int, families: int) -> list[list[Int32Array]]:
    random = np.random.default_rng(0)
    out = []
    for _ in range(families):
        context = random.integers(0, vocab, CONTEXT)
        tails = random.integers(0, vocab, (SIBLINGS, TAIL))
        out.append([np.concatenate([context, tail]).astype(np.int32) for tail in tails])
    return out


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ours(engine: Engine, prompts: Sequence[Int32Array], ids: list[int]) -> np.ndarray:
    results = engine.scoring.score([AtomicRequest.candidates(tokens, ids) for tokens in prompts])
    return np.stack([result.logits for result in results])


class Peer:
    """transformers on the same checkpoint."""

    def __init__(self, dtype: torch.dtype, ids: list[int]) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
        self.ids = ids
        self.experts, self.batch = "eager", 1

    @torch.inference_mode()
    def padded(self, prompts: Sequence[Int32Array]) -> np.ndarray:
        """Candidate logits, batched in order of length and padded on the left."""
        self.model.set_experts_implementation(self.experts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out = np.empty((len(prompts), len(self.ids)), np.float32)
        for low in range(0, len(order), self.batch):
            part = order[low : low + self.batch]
            longest = max(len(prompts[i]) for i in part)
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(part):
                ids[row, longest - len(prompts[index]) :] = torch.from_numpy(prompts[index])
                mask[row, longest - len(prompts[index]) :] = 1
            even = bool(mask.all())
            positions = None if even else (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self.model(
                ids, attention_mask=None if even else mask, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits
            out[part] = logits[:, -1, self.ids].float().numpy()
        return out

    @torch.inference_mode()
    def cached(self, families: Sequence[Sequence[Int32Array]]) -> np.ndarray:
        """Candidate logits with the context computed once and its cache repeated for the siblings."""
        self.model.set_experts_implementation(self.experts)
        out = []
        for family in families:
            context = torch.from_numpy(family[0][:CONTEXT]).long()[None]
            cache = self.model(context, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(family))
            tails = torch.from_numpy(np.stack([tokens[CONTEXT:] for tokens in family])).long()
            logits = self.model(tails, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            out.append(logits[:, -1, self.ids].float().numpy())
        return np.concatenate(out)


def serve_peer(dtype: torch.dtype, ids: list[int], threads: int, connection: Connection) -> None:
    """The peer's process: timed calls of ``padded`` and ``cached`` until it is told to stop."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    peer = Peer(dtype, ids)
    while (call := connection.recv()) is not None:
        method, prompts, peer.experts, peer.batch = call
        start = time.perf_counter()
        logits = getattr(peer, method)(prompts)
        connection.send((time.perf_counter() - start, logits))


class PeerProcess:
    """``Peer`` in a process of its own, with the settings that ``tune`` found."""

    def __init__(self, dtype: torch.dtype, ids: list[int], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve_peer, args=(dtype, ids, threads, other), daemon=True)
        self._process.start()
        self.experts, self.batch = EXPERTS[0], 1

    def call(self, method: str, prompts: Sequence[Any]) -> tuple[float, np.ndarray]:
        """Seconds and candidate logits."""
        self._connection.send((method, prompts, self.experts, self.batch))
        took, logits = self._connection.recv()
        return took, logits

    def seconds(self, method: str, prompts: Sequence[Any]) -> float:
        return self.call(method, prompts)[0]

    def tune(self, method: str, few: Sequence[Any], more: Sequence[Any], batches: Sequence[int]) -> str:
        """The experts implementation by a few prompts, then the batch size by more of them.

        An implementation twice as slow as another there is no candidate: one of them gathers a matrix a row.
        """
        times: dict[str, float] = {}
        for experts in EXPERTS:
            self.experts, self.batch = experts, 2
            self.seconds(method, few[:1])
            times[experts] = self.seconds(method, few)
        settings = [(name, batch) for name in EXPERTS if times[name] <= 2 * min(times.values()) for batch in batches]
        found = dict.fromkeys(settings, float("inf"))
        for setting in settings * 3:  # in turn, so that a disturbance does not choose
            self.experts, self.batch = setting
            found[setting] = min(found[setting], self.seconds(method, more))
        self.experts, self.batch = min(found, key=lambda setting: found[setting])
        return f"experts {self.experts}, batch {self.batch}; of {len(EXPERTS)} implementations, batches {batches}"

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def alternate(a: Callable[[], float], b: Callable[[], float], runs: int) -> tuple[float, float]:
    """Median seconds of each, run in turn; both warm up."""
    a()
    b()
    pairs = [(a(), b()) for _ in range(runs)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def agree(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max() / np.abs(right).max())


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def measure(precision: str, threads: int, mails: int, families: int, runs: int) -> dict[str, Any]:
    plain = Engine(MODEL, device="cpu", dtype=precision, threads=threads, sharing="off", prune_last=True)
    sharing = Engine(MODEL, device="cpu", dtype=precision, threads=threads)
    ids = [int(i) for i in (plain.tokenizer.token_id("Ġspam") or 1, plain.tokenizer.token_id("Ġham") or 2)]
    peer = PeerProcess(getattr(torch, precision), ids, threads)
    prompts = mail_prompts(plain, mails)
    tokens = sum(len(p) for p in prompts)
    setting = peer.tune("padded", prompts[:4], prompts[:32], (1, 4, 8, 16))
    difference = agree(ours(plain, prompts, ids), peer.call("padded", prompts)[1])
    mine, theirs = alternate(
        lambda: seconds(lambda: ours(plain, prompts, ids)), lambda: peer.seconds("padded", prompts), runs
    )
    print(f"{precision}: no sharing {tokens / mine:.0f} against {tokens / theirs:.0f} tokens/s ({setting})", flush=True)
    groups = sibling_prompts(plain.tokenizer.vocab_size, families)
    flat = [tokens for family in groups for tokens in family]

    def my_siblings() -> float:
        return seconds(lambda: ours(sharing, flat, ids))

    sibling_setting = peer.tune("padded", flat[:2], flat[: 2 * SIBLINGS], (1, 4, 8, 16))
    my_8, their_8 = alternate(my_siblings, lambda: peer.seconds("padded", flat), runs)
    cache_setting = peer.tune("cached", groups[:1], groups[:3], (SIBLINGS,))
    difference_8 = agree(ours(sharing, flat, ids), peer.call("cached", groups)[1])
    my_again, their_cache = alternate(my_siblings, lambda: peer.seconds("cached", groups), runs)
    print(f"{precision}: 8 siblings {their_8 / my_8:.2f}x, by hand {their_cache / my_again:.2f}x", flush=True)
    peer.close()
    plain.close()
    sharing.close()
    return {
        "precision": precision,
        "ratio_no_sharing": theirs / mine,
        "ratio_8_siblings": their_8 / my_8,
        "ratio_8_siblings_manual_cache": their_cache / my_again,
        "tokens_per_s": tokens / mine,
        "peer_tokens_per_s": tokens / theirs,
        "requests_per_s_8_siblings": len(flat) / my_8,
        "peer_requests_per_s_8_siblings": len(flat) / their_8,
        "peer_requests_per_s_8_siblings_manual_cache": len(flat) / their_cache,
        "peer_settings": {"no_sharing": setting, "8_siblings": sibling_setting, "manual_cache": cache_setting},
        "largest_relative_difference": max(difference, difference_8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mails", type=int, default=128)
    parser.add_argument("--families", type=int, default=6)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    cells = [
        measure(precision, options.threads, options.mails, options.families, options.runs)
        for precision in ("bfloat16", "float32")
    ]
    report = {
        **{key: value for key, value in cells[0].items() if key.startswith("ratio")},
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu_name()}, {options.threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cells": cells,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
