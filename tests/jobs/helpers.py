"""Make small tables in every format and run fake jobs over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fakes import FakeEngine, FakeTask

from moe_prefill.jobs import FileOutput, JobConfig, Summary, run_job
from moe_prefill.jobs.tables import Table, choose_format, find_files, format_of, open_table
from moe_prefill.jobs.tables.values import csv_field

MODEL = {"weights": "w1", "tokenizer": "t1"}
TEXTS = ["first, with comma", 'a "quoted" one', "two\nlines", "", "Grüße 漢字 🙂", "x" * 100, "007", " spaces ", "last"]


def rows(count: int) -> list[dict[str, Any]]:
    """Rows with an awkward text, an id and a gold label."""
    return [
        {
            "id": f"{i:03d}",
            "text": TEXTS[i % len(TEXTS)] + (str(i) if i % len(TEXTS) != 3 else ""),
            "gold": ("ham", "spam")[i % 2],
        }
        for i in range(count)
    ]


def write_table(path: Path, table_rows: Sequence[dict[str, Any]], row_group_size: int = 10) -> Path:
    kind = format_of(path)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(table_rows)), path, row_group_size=row_group_size)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table_rows))
    else:
        mark = "\t" if kind == "tsv" else ","
        lines = [list(table_rows[0]), *([str(v) for v in row.values()] for row in table_rows)]
        path.write_text("".join(mark.join(map(csv_field, line)) + "\n" for line in lines), newline="")
    return path


def open_for(source: str | Path, output: Path, **options: Any) -> Table:
    files = find_files(str(source))
    kind = choose_format(files, None)
    return open_table(files, kind, infer_schema=format_of(output) == "parquet", **options)


def run(
    source: str | Path,
    output: Path,
    *,
    window_rows: int | None = 7,
    limit: int | None = None,
    task: Any = None,
    engine: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    model: dict[str, str] | None = None,
    **config: Any,
) -> Summary:
    target = FileOutput(output, resume=resume, overwrite=overwrite)
    try:
        kind = format_of(output)
        assert kind
        settings = JobConfig(output_format=kind, window_rows=window_rows, **config)
        table = open_for(source, output, limit=limit, window_rows=window_rows)
        return run_job(
            table,
            task or FakeTask(),
            engine or FakeEngine(),
            target,
            settings,
            model=model or MODEL,
            output_name=str(output),
        )
    finally:
        target.close()
