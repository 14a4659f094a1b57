"""Sets and rankings against gold cells."""

from __future__ import annotations

import string
from collections import Counter

import pytest

from moe_prefill.errors import UsageError
from moe_prefill.jobs import Counts, LabelMetrics, RankMetrics, SetMetrics, metrics_of
from moe_prefill.jobs.compare import check_comparable, compared_pair, gold_items


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        (["a", "b"], ["a", "b"]),
        ('["a, x", "b"]', ["a, x", "b"]),
        ("a; b,c", ["a", "b", "c"]),
        ("[odd", ["[odd"]),
        ("[]", []),
        (7, ["7"]),
    ],
)
def test_cells_with_several_labels(cell: object, items: list[str]) -> None:
    assert gold_items(cell) == items


def test_sets() -> None:
    rows = [("a,b", ["b", "a"]), ("a", ["a", "c"]), ("b", []), ("[]", [])]
    counts = Counts(pairs=Counter(compared_pair("select", gold, given) for gold, given in rows))
    counts.pairs['["a"]', None] += 2
    metrics = metrics_of("select", counts)
    assert isinstance(metrics, SetMetrics)
    assert (metrics.compared, metrics.exact, metrics.apart.with_error) == (4, 0.5, 2)
    assert metrics.micro_f1 == 2 * 3 / (4 + 4)
    assert {c.label: c.f1 for c in metrics.classes} == {"a": 1.0, "b": 2 / 3, "c": 0.0}
    assert metrics.to_json()["exact_match"] == 0.5


def test_options_are_named_by_identifiers() -> None:
    counts = Counts(pairs=Counter([("A", "A"), ("C", "A"), ("the first option", "A"), ("1", "B")]))
    metrics = metrics_of("choose", counts, string.ascii_uppercase)
    assert isinstance(metrics, LabelMetrics)
    assert (metrics.labels, metrics.compared, metrics.accuracy) == (("A", "B", "C"), 2, 0.5)
    assert metrics.apart.unknown_gold == {"1": 1, "the first option": 1}


def test_rankings() -> None:
    rows = [("a", ["a", "b"]), ("b;c", ["a", "c", "b"]), ("z", ["a"])]
    counts = Counts(pairs=Counter(compared_pair("rank", gold, given) for gold, given in rows))
    metrics = metrics_of("rank", counts)
    assert isinstance(metrics, RankMetrics)
    assert (metrics.compared, metrics.first, metrics.mrr) == (3, 1 / 3, 0.5)


def test_scores_are_not_compared() -> None:
    with pytest.raises(UsageError, match="--label-column"):
        check_comparable("score")
