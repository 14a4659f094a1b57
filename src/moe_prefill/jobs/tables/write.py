"""Write the rows of a window as a part, and join parts into the final table, format by format."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ...core import Column
from .batch import Batch, Format, Row, Table
from .values import csv_field, csv_text, json_text

if TYPE_CHECKING:
    import pyarrow as pa


class TableWriter(ABC):
    """Writes the input's columns and then the added ones; a part and the final file are pure functions of the rows."""

    suffix: str

    def __init__(self, table: Table, added: Sequence[Column]) -> None:
        self.columns = table.columns
        self.added = tuple(added)

    @property
    def header(self) -> bytes:
        """What the final file has before the parts."""
        return b""

    @abstractmethod
    def write_part(self, file: IO[bytes], batch: Batch, added: Sequence[Row]) -> None:
        """Write the rows of one window; ``added`` has the values of the added columns, row by row."""

    def join(self, file: IO[bytes], parts: Iterable[Path]) -> None:
        """Write the final file from its parts."""
        file.write(self.header)
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)


class CsvWriter(TableWriter):
    """CSV or TSV, lines ending in a line feed."""

    def __init__(self, table: Table, added: Sequence[Column], format: Format) -> None:
        super().__init__(table, added)
        self.suffix = f".{format}"
        self._delimiter = "\t" if format == "tsv" else ","

    @property
    def header(self) -> bytes:
        return self._line([*self.columns, *(column.name for column in self.added)])

    def write_part(self, file: IO[bytes], batch: Batch, added: Sequence[Row]) -> None:
        names = [column.name for column in self.added]
        for row, extra in zip(batch.rows, added, strict=True):
            file.write(self._line([row.get(name) for name in self.columns] + [extra.get(name) for name in names]))

    def _line(self, values: Iterable[object]) -> bytes:
        return (self._delimiter.join(csv_field(csv_text(value)) for value in values) + "\n").encode()


class JsonlWriter(TableWriter):
    """JSON lines. Rows from JSONL keep their text byte for byte; the added fields follow inside the object."""

    suffix = ".jsonl"

    def write_part(self, file: IO[bytes], batch: Batch, added: Sequence[Row]) -> None:
        names = [column.name for column in self.added]
        lines: Sequence[str | None] = batch.lines or [None] * len(batch.rows)
        for index, (row, line, extra) in enumerate(zip(batch.rows, lines, added, strict=True)):
            text = json_text(row) if line is None or index in batch.errors else line
            fields = json_text({name: extra.get(name) for name in names})
            head = text[:-1].rstrip()
            file.write((head + ("" if head == "{" else ", ") + fields[1:] + "\n").encode())


class ParquetWriter(TableWriter):
    """Parquet with one row group a window."""

    suffix = ".parquet"

    def __init__(self, table: Table, added: Sequence[Column]) -> None:
        super().__init__(table, added)
        import pyarrow as pa

        self._input_schema = table.arrow_schema()
        fields = [pa.field(column.name, _arrow_type(column)) for column in added]
        self.schema = pa.schema([*self._input_schema, *fields], metadata=self._input_schema.metadata)

    def write_part(self, file: IO[bytes], batch: Batch, added: Sequence[Row]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if batch.table is not None:
            arrays = list(batch.table.columns)
        else:
            arrays = [pa.array([row.get(f.name) for row in batch.rows], f.type) for f in self._input_schema]
        arrays += [_array(column, added) for column in self.added]
        table = pa.table(arrays, schema=self.schema)
        pq.write_table(table, file, compression="zstd", row_group_size=max(1, table.num_rows))

    def join(self, file: IO[bytes], parts: Iterable[Path]) -> None:
        import pyarrow.parquet as pq

        with pq.ParquetWriter(file, self.schema, compression="zstd") as writer:
            for part in parts:
                with pq.ParquetFile(part) as source:
                    table = source.read()
                writer.write_table(table, row_group_size=max(1, table.num_rows))


def open_writer(format: Format, table: Table, added: Sequence[Column]) -> TableWriter:
    """The writer of a format. Raises InputError where a JSONL column has no Parquet type."""
    if format == "parquet":
        return ParquetWriter(table, added)
    return JsonlWriter(table, added) if format == "jsonl" else CsvWriter(table, added, format)


def _arrow_type(column: Column) -> pa.DataType:
    import pyarrow as pa

    return {
        "string": pa.string(),
        "float": pa.float64(),
        "int": pa.int64(),
        "bool": pa.bool_(),
        "float_map": pa.map_(pa.string(), pa.float64()),
        "strings": pa.list_(pa.string()),
        "floats": pa.list_(pa.float64()),
        "ints": pa.list_(pa.int64()),
        "float_lists": pa.list_(pa.list_(pa.float64())),
        "json": pa.string(),
    }[column.kind]


def _array(column: Column, added: Sequence[Row]) -> pa.Array:
    import pyarrow as pa

    values = [row.get(column.name) for row in added]
    if column.kind == "json":
        values = [None if value is None else json_text(value) for value in values]
    elif column.kind == "float_map":
        values = [list(value.items()) if isinstance(value, dict) else None for value in values]
    return pa.array(values, _arrow_type(column))
