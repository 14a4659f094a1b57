"""Answers compared with a gold column: accuracy, F1 and the confusion table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .counts import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One class: gold rows (``support``) among those compared, and the usual three ratios."""

    label: str
    support: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """``compared`` rows have an answer and a known gold label; the others are counted apart and enter no ratio."""

    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]  # [gold][given]
    classes: tuple[ClassScore, ...]
    compared: int
    accuracy: float
    macro_f1: float
    with_error: int
    unknown_gold: dict[str, int]
    no_gold: int

    def to_json(self) -> dict[str, object]:
        return {
            "compared": self.compared,
            "accuracy": round(self.accuracy, 6),
            "macro_f1": round(self.macro_f1, 6),
            "classes": {
                c.label: {
                    "support": c.support,
                    "precision": round(c.precision, 6),
                    "recall": round(c.recall, 6),
                    "f1": round(c.f1, 6),
                }
                for c in self.classes
            },
            "confusion": {
                gold: dict(zip(self.labels, row, strict=True))
                for gold, row in zip(self.labels, self.confusion, strict=True)
            },
            "rows_with_error": self.with_error,
            "rows_with_unknown_gold": sum(self.unknown_gold.values()),
            "unknown_gold": self.unknown_gold,
            "rows_without_gold": self.no_gold,
        }


def compute_metrics(counts: Counts, known: Sequence[str] | None = None) -> Metrics:
    """Metrics of single-label answers.

    ``known`` are the task's labels in order; without them, every gold label and answer met is one. Macro F1 is the
    mean over labels that occur as gold or as answer.
    """
    labels = tuple(known) if known is not None else _met(counts)
    good = Counter[tuple[str, str | None]](
        {(g, a): n for (g, a), n in counts.pairs.items() if g in labels and a is not None}
    )
    unknown = Counter[str]()
    for (gold, _), n in counts.pairs.items():
        if gold not in labels:
            unknown[gold] += n
    confusion = tuple(tuple(good[gold, given] for given in labels) for gold in labels)
    compared = good.total()
    classes = tuple(_class_score(label, good) for label in labels)
    present = [c for c in classes if c.support or any(given == c.label for _, given in good)]
    return Metrics(
        labels=labels,
        confusion=confusion,
        classes=classes,
        compared=compared,
        accuracy=_ratio(sum(good[label, label] for label in labels), compared),
        macro_f1=_ratio(sum(c.f1 for c in present), len(present)),
        with_error=sum(n for (g, a), n in counts.pairs.items() if a is None and g in labels),
        unknown_gold=dict(sorted(unknown.items())),
        no_gold=counts.notes["no_gold_label"],
    )


def _met(counts: Counts) -> tuple[str, ...]:
    return tuple(sorted({text for pair in counts.pairs for text in pair if text is not None}))


def _class_score(label: str, good: Counter[tuple[str, str | None]]) -> ClassScore:
    support = sum(n for (gold, _), n in good.items() if gold == label)
    answers = sum(n for (_, given), n in good.items() if given == label)
    hits = good[label, label]
    return ClassScore(
        label=label,
        support=support,
        precision=_ratio(hits, answers),
        recall=_ratio(hits, support),
        f1=_ratio(2 * hits, support + answers),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
