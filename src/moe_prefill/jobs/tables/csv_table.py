"""CSV and TSV: every value is kept as the text that it is."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from .batch import Batch, Format
from .lines import LineReader
from .text import TextTable

if TYPE_CHECKING:
    import pyarrow as pa

MAX_FIELD_CHARS = 16 * 1024 * 1024


class CsvTable(TextTable[list[str]]):
    """RFC 4180 tables with a header. Python's parser rather than Arrow's: it keeps values verbatim and knows row
    numbers.

    Raises InputError for a header with duplicate names, shards whose headers differ, a row whose number of fields is
    not the header's, and broken quoting. Blank lines are skipped.
    """

    format: ClassVar[Format] = "csv"
    delimiter: ClassVar[str] = ","

    def __init__(self, files: Sequence[Path], *, limit: int | None, granule_rows: int) -> None:
        self.columns = ()
        self._orders: dict[int, list[int]] = {}  # of files whose columns come in another order than the first file's
        self._seen: set[int] = set()
        csv.field_size_limit(MAX_FIELD_CHARS)
        super().__init__(files, limit=limit, granule_rows=granule_rows)

    def arrow_schema(self) -> pa.Schema:
        import pyarrow as pa

        return pa.schema([(name, pa.string()) for name in self.columns])

    def _records(self, file: int, lines: LineReader) -> Iterator[list[str]]:
        from_start = lines.offset == 0
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        row = 0
        try:
            if from_start:
                self._header(file, lines.path, next(filter(None, reader), None))
            width, order = len(self.columns), self._orders.get(file)
            for row, fields in enumerate(filter(None, reader), start=1):
                if len(fields) != width:
                    raise InputError(self._ragged(lines, row, fields))
                yield fields if order is None else [fields[i] for i in order]
        except csv.Error as error:
            why = f"{error}; a quote is probably not closed or not doubled, or the delimiter is not {self.delimiter!r}"
            if "new-line character" in str(error):
                why = "a carriage return stands alone; convert such line ends, for example with `tr '\\r' '\\n'`"
            raise InputError(f"{lines.path}: row {row + 1:,} (line {lines.line:,}) is not CSV: {why}") from error

    def _header(self, file: int, path: Path, names: list[str] | None) -> None:
        if file in self._seen:
            return
        if names is None:
            raise InputError(f"{path}: the file is empty; a header with column names is needed")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"{path}: the header names {', '.join(map(repr, twice))} more than once; rename the columns"
            )
        self._seen.add(file)
        if not self.columns:
            self.columns = tuple(names)
        elif names != list(self.columns):
            check_same_columns(path, names, self.files[0], self.columns)
            self._orders[file] = [names.index(name) for name in self.columns]

    def _ragged(self, lines: LineReader, row: int, fields: list[str]) -> str:
        count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
        return (
            f"{lines.path}: row {row:,} (line {lines.line:,}) has {count}, the header "
            f"has {len(self.columns)}; it starts with {fields[0][:40]!r}. Quote fields that hold {self.delimiter!r}"
        )

    def _learn(self, record: list[str], row: int) -> None:
        pass

    def _batch(self, records: list[list[str]], columns: frozenset[str] | None) -> Batch:
        return Batch([dict(zip(self.columns, fields, strict=True)) for fields in records])


class TsvTable(CsvTable):
    """The same with tabs."""

    format: ClassVar[Format] = "tsv"
    delimiter: ClassVar[str] = "\t"


def check_same_columns(path: Path, names: Sequence[str], first: Path, columns: Sequence[str]) -> None:
    """Raise InputError unless two shards have the same columns, in whatever order."""
    missing = [name for name in columns if name not in names]
    extra = [name for name in names if name not in columns]
    if missing or extra:
        raise InputError(
            f"{path}: its columns are not those of {first}: missing {missing or 'none'}, additional "
            f"{extra or 'none'}; all "
            "shards need the same columns"
        )
