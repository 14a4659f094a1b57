"""Show a few rows of a labelled table: the surest, and the wrong ones."""

from __future__ import annotations

import csv
import sys

from rich.console import Console
from rich.table import Table


def main(path: str) -> None:
    with open(path, newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if not row["error"]]
    wrong = [row for row in rows if row["label"] != row["predicted_label"]]
    surest = sorted(rows, key=lambda row: -float(row["probability"]))
    table = Table(title=f"{path}: three sure answers, then {min(5, len(wrong))} of {len(wrong)} wrong ones")
    table.add_column("subject", overflow="ellipsis", no_wrap=True, max_width=48)
    for name in ("label", "answer", "probability"):
        table.add_column(name, no_wrap=True)
    for row in [*surest[:3], *wrong[:5]]:
        table.add_row(row["subject"], row["label"], row["predicted_label"], f"{float(row['probability']):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1])
