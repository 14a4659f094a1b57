"""Parquet: rows keep their types; Python values are made only where a task or a text format needs them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from .batch import Batch, Format, Row, Table
from .csv_table import check_same_columns
from .lines import Hasher

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_READ_ROWS = 1024  # rows decoded at a time: bounds memory beside one window
_BUFFER_BYTES = 1 << 20  # of each column: a row group is streamed, not read whole


class ParquetTable(Table):
    """Parquet files with the same columns and types. Raises InputError for damaged files and shards that differ."""

    format: ClassVar[Format] = "parquet"

    def __init__(self, files: Sequence[Path], *, limit: int | None, granule_rows: int) -> None:
        super().__init__(files, limit=limit, granule_rows=granule_rows)
        self._schema = _schema(self.files[0])
        self.columns = tuple(self._schema.names)
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice or not self.columns:
            what = f"the columns {twice} exist more than once; rename them" if twice else "the table has no columns"
            raise InputError(f"{self.files[0]}: {what}")
        self._scan()

    def arrow_schema(self) -> pa.Schema:
        return self._schema

    def _scan_file(self, index: int, path: Path, digest: Hasher) -> None:
        self._check_schema(path)
        self._index(index, path)
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())

    def _index(self, index: int, path: Path) -> None:
        """Mark rows by the metadata alone: each counts as the average of its row group."""
        row = 0
        with _open(path) as file:
            for group in (file.metadata.row_group(i) for i in range(file.num_row_groups)):
                row_bytes = -(-group.total_byte_size // max(1, group.num_rows))
                for _ in range(group.num_rows):
                    if self._limit is not None and self.num_rows >= self._limit:
                        return
                    self.marks.add(index, row, row_bytes)
                    self.num_bytes += row_bytes
                    row += 1

    def _check_schema(self, path: Path) -> None:
        schema = _schema(path)
        check_same_columns(path, schema.names, self.files[0], self.columns)
        for expected in self._schema:
            if schema.field(expected.name).type != expected.type:
                raise InputError(
                    f"{path}: column {expected.name!r} is {schema.field(expected.name).type}, in {self.files[0]} it is "
                    f"{expected.type}; all shards need the same types"
                )

    def read(self, mark: int, counts: Sequence[int], columns: frozenset[str] | None = None) -> Iterator[Batch]:
        import pyarrow as pa

        pieces = self._pieces(self.marks.files[mark], self.marks.offsets[mark])
        held = self._schema.empty_table()
        for count in counts:
            parts, have = [held], held.num_rows
            while have < count:
                piece = next(pieces, None)
                if piece is None:
                    raise self._shorter()
                parts.append(piece)
                have += parts[-1].num_rows
            joined = pa.concat_tables(parts)
            held = joined.slice(count)
            yield _batch(joined.slice(0, count), columns)
            del parts, joined
            pa.default_memory_pool().release_unused()  # or freed row groups pile up in the pool

    def _pieces(self, first_file: int, skip: int) -> Iterator[pa.Table]:
        for path in self.files[first_file:]:
            with _open(path) as file:
                groups, skip = _groups_from(file, skip)
                for group in groups:  # one at a time: Arrow joins no lists of dictionary values over two of them
                    for batch in file.iter_batches(_READ_ROWS, row_groups=[group]):
                        taken = min(skip, batch.num_rows)
                        skip -= taken
                        yield _table(batch.slice(taken), self._schema)
            skip = 0


def _groups_from(file: pq.ParquetFile, skip: int) -> tuple[list[int], int]:
    """The row groups from row ``skip`` on, and how many rows of the first one come before it."""
    groups = range(file.num_row_groups)
    for index in groups:
        num_rows = file.metadata.row_group(index).num_rows
        if skip < num_rows:
            return list(groups[index:]), skip
        skip -= num_rows
    return [], skip


def _table(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_batches([batch]).select(schema.names).replace_schema_metadata(schema.metadata).cast(schema)


def _batch(table: pa.Table, columns: frozenset[str] | None) -> Batch:
    names = [name for name in table.column_names if columns is None or name in columns]
    values = [plain_values(table.column(name), name) for name in names]
    rows: list[Row] = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
    return Batch(rows if names else [{} for _ in range(table.num_rows)], table=table)


def plain_values(column: pa.ChunkedArray, name: str) -> list[object]:
    """Python values that JSON has: times, dates and decimals become text, bytes stay bytes, and numbers of single
    precision the shortest that tell them apart (0.1, not 0.10000000149011612).

    Raises InputError for a type that has no such form.
    """
    import pyarrow as pa

    try:
        for kind in (_plain(column.type, pa.string()), _plain(column.type, pa.float64())):
            column = column if column.type == kind else column.cast(kind)
        return list(column.to_pylist(maps_as_pydicts="lossy"))
    except (pa.ArrowException, NotImplementedError) as error:
        raise InputError(
            f"column {name!r} of type {column.type} has no text form ({error}); write Parquet or drop it"
        ) from error


def _plain(kind: pa.DataType, single: pa.DataType) -> pa.DataType:
    """The type to cast to before Python sees the values, with ``single`` in the place of single precision; independent
    of whether pandas is installed.
    """
    import pyarrow as pa
    import pyarrow.types as is_type

    if is_type.is_float32(kind):
        return single
    if is_type.is_dictionary(kind):
        return _plain(kind.value_type, single)
    if is_type.is_temporal(kind) or is_type.is_decimal(kind):
        return pa.string()
    if is_type.is_list(kind) or is_type.is_large_list(kind) or is_type.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type, single))
    if is_type.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain(f.type, single)) for f in kind])
    if is_type.is_map(kind):
        if not (is_type.is_string(kind.key_type) or is_type.is_large_string(kind.key_type)):
            raise pa.ArrowNotImplementedError("the keys of the map are not strings")
        return pa.map_(kind.key_type, _plain(kind.item_type, single))
    return kind


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from error


def _schema(path: Path) -> pa.Schema:
    with _open(path) as file:
        return file.schema_arrow
