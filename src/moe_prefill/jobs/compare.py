"""How a task's answer is compared with a gold column: labels, sets (select) or places in a ranking (rank)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .counts import Counts
from .metrics import Apart, ClassScore, LabelMetrics, label_metrics, met_labels, ratio, rows_text
from .tables.values import csv_text

_SEPARATORS = re.compile(r"\s*[;,]\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetMetrics:
    """Metrics of a set of labels a row. Micro F1 pools all labels; macro F1 is the mean over labels that occur."""

    classes: tuple[ClassScore, ...]
    compared: int
    exact: float
    micro_f1: float
    macro_f1: float
    apart: Apart

    def headline(self) -> str:
        ratios = f"exact match {self.exact:.4f}, micro F1 {self.micro_f1:.4f}, macro F1 {self.macro_f1:.4f}"
        return f"{ratios} over {rows_text(self.compared)}"

    def to_json(self) -> dict[str, object]:
        return {
            "compared": self.compared,
            "exact_match": round(self.exact, 6),
            "micro_f1": round(self.micro_f1, 6),
            "macro_f1": round(self.macro_f1, 6),
            "classes": {c.label: c.to_json() for c in self.classes},
            **self.apart.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMetrics:
    """Where the best of the gold candidates stands; a row whose gold candidates are not in the ranking is a miss."""

    compared: int
    first: float
    mrr: float
    apart: Apart

    def headline(self) -> str:
        return f"gold first {self.first:.4f}, mean reciprocal rank {self.mrr:.4f} over {rows_text(self.compared)}"

    def to_json(self) -> dict[str, object]:
        ratios = {"gold_first": round(self.first, 6), "mean_reciprocal_rank": round(self.mrr, 6)}
        return {"compared": self.compared, **ratios, **self.apart.to_json()}


Metrics = LabelMetrics | SetMetrics | RankMetrics


def check_comparable(task_kind: str) -> None:
    """Raise UsageError for a task whose answers are no labels."""
    if task_kind == "score":
        raise UsageError("--label-column: score gives log-probabilities, not labels; leave it out")


def compared_pair(task_kind: str, gold: object, given: object) -> tuple[str, str]:
    """What is counted for one row: gold and answer as texts (sets sorted), or for a ranking "" and the place from 1."""
    if task_kind == "select":
        return json.dumps(sorted(set(gold_items(gold)))), json.dumps(sorted(set(gold_items(given))))
    if task_kind == "rank":
        wanted, ranking = set(gold_items(gold)), gold_items(given)
        places = [place for place, name in enumerate(ranking, start=1) if name in wanted]
        return "", str(min(places, default=0))
    return csv_text(gold), csv_text(given)


def metrics_of(task_kind: str, counts: Counts, known: Sequence[str] | None = None) -> Metrics:
    """The metrics that suit a task, from what was counted."""
    if task_kind == "select":
        return _set_metrics(counts)
    if task_kind == "rank":
        return _rank_metrics(counts)
    if task_kind == "choose" and known is not None:  # there are more identifiers than most tables use
        met = met_labels(counts)
        known = [name for name in known if name in met]
    return label_metrics(counts, known)


def gold_items(value: object) -> list[str]:
    """Labels of one cell: a list, the JSON text of one, or texts separated by commas or semicolons."""
    if isinstance(value, list | tuple):
        return [csv_text(item) for item in value]
    text = csv_text(value).strip()
    if text.startswith("["):
        try:
            return [csv_text(item) for item in json.loads(text)]
        except ValueError:
            pass  # a label that begins with a bracket
    return [item for item in _SEPARATORS.split(text) if item]


def _set_metrics(counts: Counts) -> SetMetrics:
    hits, support, answers = Counter[str](), Counter[str](), Counter[str]()
    compared = exact = 0
    for (gold_text, given_text), n in counts.pairs.items():
        if given_text is None:
            continue
        gold, given = set(json.loads(gold_text)), set(json.loads(given_text))
        compared += n
        exact += n * (gold == given)
        for labels, counter in ((gold & given, hits), (gold, support), (given, answers)):
            counter.update(dict.fromkeys(labels, n))
    classes = tuple(
        ClassScore.of(label, hits=hits[label], support=support[label], answers=answers[label])
        for label in sorted(support | answers)
    )
    return SetMetrics(
        classes=classes,
        compared=compared,
        exact=ratio(exact, compared),
        micro_f1=ratio(2 * hits.total(), support.total() + answers.total()),
        macro_f1=ratio(sum(c.f1 for c in classes), len(classes)),
        apart=_apart(counts),
    )


def _rank_metrics(counts: Counts) -> RankMetrics:
    places = Counter({int(place): n for (_, place), n in counts.pairs.items() if place is not None})
    return RankMetrics(
        compared=places.total(),
        first=ratio(places[1], places.total()),
        mrr=ratio(sum(n / place for place, n in places.items() if place), places.total()),
        apart=_apart(counts),
    )


def _apart(counts: Counts) -> Apart:
    with_error = sum(n for (_, given), n in counts.pairs.items() if given is None)
    return Apart(with_error=with_error, unknown_gold={}, no_gold=counts.notes["no_gold_label"])
