"""Answers compared with a gold column: accuracy, F1 and the confusion table of single labels."""

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

    @classmethod
    def of(cls, label: str, *, hits: int, support: int, answers: int) -> ClassScore:
        return cls(
            label=label,
            support=support,
            precision=ratio(hits, answers),
            recall=ratio(hits, support),
            f1=ratio(2 * hits, support + answers),
        )

    def to_json(self) -> dict[str, object]:
        ratios = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        return {"support": self.support, **{name: round(value, 6) for name, value in ratios.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """Rows that enter no ratio: with an error, with a gold label that the task does not have, without a gold label."""

    with_error: int
    unknown_gold: dict[str, int]
    no_gold: int

    def to_json(self) -> dict[str, object]:
        return {
            "rows_with_error": self.with_error,
            "rows_with_unknown_gold": sum(self.unknown_gold.values()),
            "unknown_gold": self.unknown_gold,
            "rows_without_gold": self.no_gold,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMetrics:
    """Metrics of one label a row. ``confusion`` counts rows by [gold][given]."""

    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    classes: tuple[ClassScore, ...]
    compared: int
    accuracy: float
    macro_f1: float
    apart: Apart

    def headline(self) -> str:
        return f"accuracy {self.accuracy:.4f}, macro F1 {self.macro_f1:.4f} over {rows_text(self.compared)}"

    def to_json(self) -> dict[str, object]:
        rows = zip(self.labels, self.confusion, strict=True)
        return {
            "compared": self.compared,
            "accuracy": round(self.accuracy, 6),
            "macro_f1": round(self.macro_f1, 6),
            "classes": {c.label: c.to_json() for c in self.classes},
            "confusion": {gold: dict(zip(self.labels, row, strict=True)) for gold, row in rows},
            **self.apart.to_json(),
        }


def label_metrics(counts: Counts, known: Sequence[str] | None = None) -> LabelMetrics:
    """Metrics of single-label answers.

    ``known`` are the task's labels in order; without them, every gold label and answer met is one. Macro F1 is the mean
    over labels that occur as gold or as answer.
    """
    labels = tuple(known) if known is not None else met_labels(counts)
    good = Counter[tuple[str, str | None]](
        {(g, a): n for (g, a), n in counts.pairs.items() if g in labels and a is not None}
    )
    unknown = Counter[str]()
    for (gold, _), n in counts.pairs.items():
        if gold not in labels:
            unknown[gold] += n
    classes = tuple(_class_score(label, good) for label in labels)
    present = [c for c in classes if c.support or any(given == c.label for _, given in good)]
    return LabelMetrics(
        labels=labels,
        confusion=tuple(tuple(good[gold, given] for given in labels) for gold in labels),
        classes=classes,
        compared=good.total(),
        accuracy=ratio(sum(good[label, label] for label in labels), good.total()),
        macro_f1=ratio(sum(c.f1 for c in present), len(present)),
        apart=Apart(
            with_error=sum(n for (g, a), n in counts.pairs.items() if a is None and g in labels),
            unknown_gold=dict(sorted(unknown.items())),
            no_gold=counts.notes["no_gold_label"],
        ),
    )


def rows_text(number: int) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{number:,} row{'s' * (number != 1)}"


def ratio(part: float, whole: float) -> float:
    """``part / whole``, 0 where there is no whole."""
    return part / whole if whole else 0.0


def met_labels(counts: Counts) -> tuple[str, ...]:
    """Every gold label and answer that was counted, sorted."""
    return tuple(sorted({text for pair in counts.pairs for text in pair if text is not None}))


def _class_score(label: str, good: Counter[tuple[str, str | None]]) -> ClassScore:
    support = sum(n for (gold, _), n in good.items() if gold == label)
    answers = sum(n for (_, given), n in good.items() if given == label)
    return ClassScore.of(label, hits=good[label, label], support=support, answers=answers)
