"""What CSV and JSONL share: a scan that checks and indexes the whole table, and windows read from any mark."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from .batch import Batch, Table
from .lines import Hasher, LineReader

Record = TypeVar("Record")


class TextTable(Table, Generic[Record]):
    """A table of text files. A subclass says how records come out of lines and what a scan learns from them."""

    def __init__(self, files: Sequence[Path], *, limit: int | None, granule_rows: int) -> None:
        super().__init__(files, limit=limit, granule_rows=granule_rows)
        self._scan()

    @abstractmethod
    def _records(self, file: int, lines: LineReader) -> Iterator[Record]:
        """The records of one file. ``lines.offset`` must be the start of the next record whenever one is yielded."""

    @abstractmethod
    def _learn(self, record: Record, row: int) -> None:
        """Look at record number ``row`` (from 0) during the scan."""

    @abstractmethod
    def _batch(self, records: list[Record], columns: frozenset[str] | None) -> Batch:
        """Make a batch of records."""

    def _scan_file(self, index: int, path: Path, digest: Hasher) -> None:
        digest.update(b"\x00file\x00")  # so that moving a row from one shard to the next is noticed
        lines = LineReader(path, hasher=digest)
        marks, limit = self.marks, self._limit
        records = self._records(index, lines)
        start = 0  # of the first record with what precedes it: reading from 0 skips a header again
        for record in records:
            self._learn(record, marks.num_rows)
            marks.add(index, start, lines.offset - start)
            self.num_bytes += lines.offset - start
            start = lines.offset
            if limit is not None and marks.num_rows >= limit:
                break

    def read(self, mark: int, counts: Sequence[int], columns: frozenset[str] | None = None) -> Iterator[Batch]:
        records = self._from(mark)
        for count in counts:
            batch = list(islice(records, count))
            if len(batch) != count:
                raise self._shorter()
            yield self._batch(batch, columns)

    def _from(self, mark: int) -> Iterator[Record]:
        offset = self.marks.offsets[mark]
        for index in range(self.marks.files[mark], len(self.files)):
            yield from self._records(index, LineReader(self.files[index], offset))
            offset = 0
