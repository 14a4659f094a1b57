"""From what the user typed to an open table: files, globs, directories of shards, standard input."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError, UsageError
from .batch import GRANULE_ROWS, Format, Table
from .csv_table import CsvTable, TsvTable
from .jsonl_table import JsonlTable
from .parquet_table import ParquetTable

_SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
FORMATS: tuple[Format, ...] = ("csv", "tsv", "jsonl", "parquet")


def format_of(path: Path, *, gzip: bool = True) -> Format | None:
    """The format that a file's name says, or None."""
    suffix = path.with_suffix("").suffix if gzip and path.suffix == ".gz" else path.suffix
    found = _SUFFIXES.get(suffix.lower())
    return None if path.suffix == ".gz" and found == "parquet" else found


def find_files(source: str) -> list[Path]:
    """The files of INPUT: itself, a glob's matches, or a directory's tables; sorted by name, which is the rows' order.

    Raises InputError where nothing is found. Hidden files and files of other kinds in a directory are left out.
    """
    path = Path(source)
    if os.path.isdir(source):  # of os.path: a name that is too long is no name of a file
        found = sorted(p for p in path.iterdir() if p.is_file() and format_of(p) and not p.name.startswith((".", "_")))
        if not found:
            raise InputError(
                f"{source}: the directory has no file ending in {', '.join(_SUFFIXES)} (or .gz of a text format)"
            )
        return found
    if os.path.isfile(source):
        return [path]
    if os.path.exists(source):
        raise InputError(f"{source}: is a pipe or a device, which cannot be read twice; give - as INPUT, with --format")
    if glob.has_magic(source):
        found = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
        if not found:
            raise InputError(f"{source}: no file matches this pattern; quote it, so that the shell leaves it as it is")
        return found
    raise InputError(f"{source}: there is no such file or directory (working directory: {os.getcwd()})")


def choose_format(files: Sequence[Path], given: str | None) -> Format:
    """The one format of all files. Raises UsageError for an unknown name, InputError for files of several formats."""
    if given is not None:
        return check_format(given)
    formats = {format_of(path) for path in files}
    if None in formats:
        unknown = next(path for path in files if format_of(path) is None)
        raise InputError(f"{unknown}: the name does not say the format; give --format {'|'.join(FORMATS)}")
    if len(formats) > 1:
        raise InputError(
            f"the files have several formats: {', '.join(sorted(map(str, formats)))}; give a glob of one kind"
        )
    found = formats.pop()
    assert found
    return found


def check_format(name: str) -> Format:
    """``name`` as a format. Raises UsageError."""
    for known in FORMATS:
        if known == name:
            return known
    raise UsageError(f"format {name!r} is not known; it must be one of {', '.join(FORMATS)}")


def open_table(
    files: Sequence[Path],
    format: Format,
    *,
    limit: int | None = None,
    window_rows: int | None = None,
    infer_schema: bool = False,
) -> Table:
    """Scan a table and return it ready to be read.

    ``limit`` keeps the first rows only. ``window_rows`` is the window size that the user asked for, so that windows
    can be cut exactly there. ``infer_schema`` finds Arrow types for JSONL, which a Parquet output needs. Raises
    InputError for everything that is wrong with the table as a whole.
    """
    granule_rows = min(GRANULE_ROWS, window_rows or GRANULE_ROWS)
    if format == "jsonl":
        return JsonlTable(files, limit=limit, granule_rows=granule_rows, infer_schema=infer_schema)
    kinds = {"csv": CsvTable, "tsv": TsvTable, "parquet": ParquetTable}
    return kinds[format](files, limit=limit, granule_rows=granule_rows)
