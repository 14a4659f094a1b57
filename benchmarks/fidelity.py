"""How far bfloat16 answers lie from float32 ones, and whether sharing, batching or splitting a sweep adds to that.

    python benchmarks/fidelity.py --out benchmarks/results/fidelity_cpu.json
    python benchmarks/fidelity.py --device cuda --out benchmarks/results/fidelity_cuda.json

The truth is float32, without sharing. The yardstick is bfloat16 without sharing, a sweep unsplit. Every other bfloat16
run may be at most 1.2 times as far from the truth as the yardstick is, in the median and in the 99th percentile of
|difference of log-probability| (natural logarithm, over the vocabulary).

Four workloads over real mails. ``spam`` and ``sentiment`` are the demo model's two tasks (reviews of its training
collection may not be shipped: the second asks for the sentiment of mails, or of ``--reviews FILE.csv``, which has a
column ``text``). ``labels`` asks of every mail whether each of four labels applies: siblings that share the mail.
``text`` scores the last half of every mail's tokens: many positions of one request. An answer is one log-probability.
Mails of ``text`` open in several ways: where a shared opening is computed in one more order, its rounding is one draw
that all answers behind it have in common, so with a single opening a ratio would tell of that draw only.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_prefill import Engine
from moe_prefill.core import AtomicRequest, AtomicResult, Float32Array

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/demo_model/checkpoint"
MAILS = ROOT / "examples/data/mails.csv"
SPAM = "Mail:\n{text}\n\nQuestion: Is this mail spam or ham?\nAnswer:"
SENTIMENT = "Review:\n{text}\n\nQuestion: Is this review positive or negative?\nAnswer:"
LABEL = 'Mail:\n{text}\n\nQuestion: Does the label "LABEL" apply?\nAnswer:'
LABELS = ("spam", "ham", "positive", "negative")
OPENINGS = ("Mail:\n", "Message:\n", "", "Text: ", "Review:\n", "News of the day\n\n", "From: me\n", "He wrote:\n")
BOUND = 1.2
REDRAWS = 200

Workloads = dict[str, list[AtomicRequest]]
Answers = dict[str, list[Float32Array]]  # of each workload's requests: log-probabilities of the asked ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to compute the same answers in bfloat16. With ``kv_gib`` they are computed twice, and the second time
    from prefixes that the first one left in the pool.
    """

    name: str
    sharing: str = "off"
    sweep_tokens: int | None = None  # None: what the memory plan allows
    chunk_rows: int | None = None
    shuffled: bool = False
    kv_gib: float = 0.0


YARDSTICK = Variant(name="unshared, unsplit")
VARIANTS = (
    Variant(name="sharing auto", sharing="auto"),
    Variant(name="sharing forced", sharing="force"),
    Variant(name="other order, small sweeps", sweep_tokens=1024, shuffled=True),
    Variant(name="small chunks", chunk_rows=96),
    Variant(name="sharing auto, other order, small sweeps", sharing="auto", sweep_tokens=1024, shuffled=True),
    Variant(name="sharing forced, small sweeps and chunks", sharing="force", sweep_tokens=1024, chunk_rows=96),
    Variant(name="prefixes from the pool, small sweeps", sharing="auto", sweep_tokens=1024, kv_gib=1.0),
)


def workloads(engine: Engine, mails: int, long: int, reviews: Sequence[str] = ()) -> Workloads:
    """The requests of every workload: over the first ``mails`` mails, ``labels`` and ``text`` over the first ``long``.

    ``reviews`` replace the mails in ``sentiment``.
    """
    texts = read_texts(MAILS)[:mails]
    tokenizer = engine.tokenizer

    def ask(prompts: list[str], words: tuple[str, ...]) -> list[AtomicRequest]:
        ids = [tokenizer.token_id(f"Ġ{word}") for word in words]
        assert None not in ids, (words, ids)
        return [AtomicRequest.candidates(tokens, ids, vocabulary=True) for tokens in tokenizer.encode_batch(prompts)]

    plain = tokenizer.encode_batch([OPENINGS[i % len(OPENINGS)] + text for i, text in enumerate(texts[:long])])
    siblings = [LABEL.format(text=text).replace("LABEL", label) for text in texts[:long] for label in LABELS]
    return {
        "spam": ask([SPAM.format(text=text) for text in texts], ("spam", "ham")),
        "sentiment": ask([SENTIMENT.format(text=text) for text in reviews or texts], ("positive", "negative")),
        "labels": ask(siblings, ("yes", "no")),
        "text": [AtomicRequest.continuation(tokens, len(tokens) // 2) for tokens in plain],
    }


def read_texts(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as lines:
        return [row["text"] for row in csv.DictReader(lines)]


def answers(requests: Workloads, variant: Variant, *, dtype: str, device: str, threads: int | None) -> Answers:
    """Every workload in one variant, each in one call to the engine."""
    settings = {"device": device, "dtype": dtype, "threads": threads, "kv_gib": variant.kv_gib}
    with Engine(MODEL, sharing=variant.sharing, max_sweep_tokens=variant.sweep_tokens, **settings) as engine:
        if variant.chunk_rows is not None:
            local: Any = engine.scoring
            local.memory = replace(
                local.memory, chunk_rows=variant.chunk_rows, max_gathered_keys=2 * variant.chunk_rows
            )
        if variant.kv_gib:
            engine.scoring.score([request for work in requests.values() for request in work])
        found = {name: _logprobs(engine, work, shuffled=variant.shuffled) for name, work in requests.items()}
        assert (engine.stats.pooled_tokens > 0) == (variant.kv_gib > 0), engine.stats
        return found


def _logprobs(engine: Engine, work: Sequence[AtomicRequest], *, shuffled: bool) -> list[Float32Array]:
    order = np.random.default_rng(0).permutation(len(work)) if shuffled else np.arange(len(work))
    out: dict[int, Float32Array] = {}
    for index, result in zip(order.tolist(), engine.scoring.score([work[i] for i in order]), strict=True):
        assert isinstance(result, AtomicResult), result
        out[index] = result.logprobs(work[index])
    return [out[index] for index in range(len(work))]


def compare(truth: Answers, yardstick: Answers, other: Answers) -> Iterator[dict[str, Any]]:
    """A row for each workload and one for all together: distances to the truth, and their ratio to the yardstick's.

    ``ratio_*_range`` is the 95% range of a ratio over redrawn sets of requests: the 99th percentile is made by a few
    tokens whose experts flip, so that a thousand answers tell it to no more than about 30%.
    """
    for name in [*truth, "all"]:
        names = list(truth) if name == "all" else [name]
        mine, theirs = _distances(truth, other, names), _distances(truth, yardstick, names)
        row: dict[str, Any] = {"workload": name, "answers": sum(map(len, mine))}
        row |= {key: float(value) for key, value in zip(("median", "p99"), _quantiles(mine), strict=True)}
        ratios = _quantiles(mine) / _quantiles(theirs)
        low, high = _range(mine, theirs)
        for index, key in enumerate(("median", "p99")):
            row[f"ratio_{key}"] = float(ratios[index])
            row[f"ratio_{key}_range"] = [float(low[index]), float(high[index])]
        row["argmax_agreement"] = agreement(truth, other, [n for n in names if n != "text"])
        yield row


def _distances(truth: Answers, other: Answers, names: Sequence[str]) -> list[Float32Array]:
    """|difference of log-probability|, an array a request."""
    return [np.abs(a - b) for name in names for a, b in zip(truth[name], other[name], strict=True)]


def _quantiles(distances: Sequence[Float32Array]) -> Float32Array:
    return np.quantile(np.concatenate(distances), (0.5, 0.99)).astype(np.float32)


def _range(mine: Sequence[Float32Array], theirs: Sequence[Float32Array]) -> Float32Array:
    """2.5% and 97.5% quantiles of the ratios over redrawn requests, the same on both sides: float32 [2, 2]."""
    chance = np.random.default_rng(0)
    ratios = []
    for _ in range(REDRAWS):
        drawn = chance.integers(0, len(mine), len(mine))
        ratios.append(_quantiles([mine[i] for i in drawn]) / _quantiles([theirs[i] for i in drawn]))
    return np.quantile(ratios, (0.025, 0.975), axis=0).astype(np.float32)


def agreement(truth: Answers, other: Answers, names: Sequence[str]) -> float | None:
    """Share of requests whose best candidate is the truth's; None for continuations, which have one candidate each."""
    pairs = [pair for name in names for pair in zip(truth[name], other[name], strict=True)]
    return float(np.mean([a.argmax() == b.argmax() for a, b in pairs])) if pairs else None


def measure(requests: Workloads, variants: Sequence[Variant], **where: Any) -> list[dict[str, Any]]:
    """Rows of the yardstick and of every variant."""
    truth = answers(requests, YARDSTICK, dtype="float32", **where)
    yardstick = answers(requests, YARDSTICK, dtype="bfloat16", **where)
    rows: list[dict[str, Any]] = []
    for variant in (YARDSTICK, *variants):
        got = yardstick if variant is YARDSTICK else answers(requests, variant, dtype="bfloat16", **where)
        for row in compare(truth, yardstick, got):
            rows.append({"variant": variant.name, **row})
            show(rows[-1])
    return rows


def show(row: Mapping[str, Any]) -> None:
    agreed = "" if row["argmax_agreement"] is None else f", {row['argmax_agreement']:.2%} same best"
    print(
        f"{row['variant']:40} {row['workload']:9} {row['answers']:6} answers: median {row['median']:.2e} "
        f"(x{row['ratio_median']:.3f}), p99 {row['p99']:.2e} (x{row['ratio_p99']:.3f}, "
        f"{row['ratio_p99_range'][0]:.2f} to {row['ratio_p99_range'][1]:.2f}){agreed}",
        flush=True,
    )


def worst(rows: Sequence[Mapping[str, Any]]) -> float:
    """The largest ratio to the yardstick over all variants, of all workloads together."""
    return max(max(row["ratio_median"], row["ratio_p99"]) for row in rows if row["workload"] == "all")


def describe(device: str) -> dict[str, Any]:
    """What the figures were measured on and with."""
    cuda = device.startswith("cuda")
    return {
        **({"gpu": torch.cuda.get_device_name()} if cuda else {"cpu": _cpu_name()}),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "git": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mails", type=int, default=400)
    parser.add_argument("--long", type=int, default=60, help="mails of the workloads labels and text")
    parser.add_argument("--reviews", type=Path, help="CSV with a column `text`")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    where = {"device": options.device, "threads": options.threads}
    with Engine(MODEL, device="cpu", dtype="float32") as engine:
        requests = workloads(
            engine, options.mails, options.long, read_texts(options.reviews) if options.reviews else ()
        )
    rows = measure(requests, VARIANTS, **where)
    report = {**describe(options.device), "bound": BOUND, "worst_ratio": worst(rows), "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"worst_ratio": report["worst_ratio"], "bound": BOUND}))


if __name__ == "__main__":
    main()
