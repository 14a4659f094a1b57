"""The end of a run: one JSON line, or a summary and the confusion table for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..jobs import ClassScore, LabelMetrics, Metrics, RankMetrics, Summary
from ..jobs.metrics import rows_text
from .flags import RunOptions
from .progress import duration

_WARN_SHARE = 0.05  # of rows whose winner length normalisation changes
_MAX_CLASSES = 20  # of a confusion table that still can be read


def report(summary: Summary, run: RunOptions) -> None:
    """Print the summary: standard output, or standard error where the rows went to standard output."""
    to_stderr = run.output == "-"
    if run.json:
        print(
            json.dumps({"event": "summary", **summary.to_json()}, ensure_ascii=False),
            file=sys.stderr if to_stderr else None,
        )
        return
    console = Console(stderr=to_stderr, highlight=False)
    if summary.metrics:
        show_metrics(summary.metrics, console)
    if not run.quiet:
        show_summary(summary, console)


def show_summary(summary: Summary, console: Console) -> None:
    """Counts, rates and what to look at."""
    counts, data = summary.counts, summary.to_json()
    resumed = f" ({summary.resumed_rows:,} of them by earlier runs)" if summary.resumed_rows else ""
    console.print(
        f"{rows_text(counts.rows)}{resumed} -> {escape(summary.output)} in {duration(summary.seconds)}", soft_wrap=True
    )
    if summary.stats.requests:
        mfu = "" if data["mfu"] is None else f", MFU {data['mfu']:.1%} of {summary.peak_flops:.3g} FLOP/s"
        saved = f"{data['saved_prefix_tokens']:.1%} of the tokens saved by sharing prefixes"
        rate = f"{data['rows_per_s']:,} rows/s, {data['tokens_per_s']:,} tokens/s"
        console.print(f"{rate}, {saved}{mfu}", soft_wrap=True)
    if summary.stats.restarts:
        lost = f"workers were lost and started again {summary.stats.restarts} time{'s' * (summary.stats.restarts != 1)}"
        back = f"{summary.stats.recovery_s:.1f} s until they were back, no row lost"
        console.print(f"[yellow]{lost}: {back}[/yellow]", soft_wrap=True)
    for code, number in counts.errors.most_common():
        console.print(f"[red]{rows_text(number)} with error {escape(code)}[/red]")
    for note, number in counts.notes.most_common():
        console.print(f"{rows_text(number)}: {escape(note.replace('_', ' '))}")
    changed = counts.notes["length_normalisation_changed"]
    if changed > _WARN_SHARE * counts.rows:
        share = f"{changed / counts.rows:.0%}"
        console.print(
            f"[yellow]warning: length normalisation changed the winner in {share} of the rows; compare both ways "
            "on rows whose label is known[/yellow]",
            soft_wrap=True,
        )


def show_metrics(metrics: Metrics, console: Console) -> None:
    """The headline, and for labels the confusion table and each class."""
    console.print(metrics.headline() if metrics.compared else "no row could be compared with the gold column")
    if metrics.compared and isinstance(metrics, LabelMetrics) and len(metrics.labels) <= _MAX_CLASSES:
        console.print(_confusion(metrics))
    if metrics.compared and not isinstance(metrics, RankMetrics):
        console.print(_classes(metrics.classes))
    apart = {
        "with an error": metrics.apart.with_error,
        "with a gold label that the task does not have": sum(metrics.apart.unknown_gold.values()),
        "without a gold label": metrics.apart.no_gold,
    }
    for what, number in apart.items():
        if number:
            console.print(f"not compared: {rows_text(number)} {what}")
    if metrics.apart.unknown_gold:
        names = ", ".join(repr(name) for name in list(metrics.apart.unknown_gold)[:10])
        console.print(f"unknown gold labels: {names}", soft_wrap=True, markup=False)


def _classes(classes: Sequence[ClassScore]) -> Table:
    table = Table("label", "rows", "precision", "recall", "F1")
    for score in classes:
        ratios = (f"{value:.4f}" for value in (score.precision, score.recall, score.f1))
        table.add_row(escape(score.label), f"{score.support:,}", *ratios)
    return table


def _confusion(metrics: LabelMetrics) -> Table:
    table = Table("gold \\ answer", *(escape(label) for label in metrics.labels))
    for label, row in zip(metrics.labels, metrics.confusion, strict=True):
        table.add_row(escape(label), *(f"{number:,}" for number in row))
    return table
