"""The nouns of the table room: a place in a table, a run of its rows, and what every table can do."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ...errors import InputError, RowError
from .lines import Hasher

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["csv", "tsv", "jsonl", "parquet"]
Row = dict[str, object]

GRANULE_ROWS = 64
GRANULE_BYTES = 64 * 1024


@dataclass(slots=True)
class Batch:
    """A run of rows as read. ``rows`` holds Python values by column name.

    ``lines`` (JSONL) keeps each row's text, so that it can be written again byte for byte. ``table`` (Parquet) keeps
    the rows with their types. ``errors`` names the rows that could not be read, by index in the batch.
    """

    rows: list[Row]
    lines: list[str] | None = None
    table: pa.Table | None = None
    errors: Mapping[int, RowError] = field(default_factory=dict)


class Marks:
    """Places in a table from which reading can start, one every granule of rows; filled by the scan.

    Windows are unions of granules, so a window can be re-read without reading what is before it. Four numbers a
    granule: 10 million rows of 1 KB need about 5 MB.
    """

    def __init__(self, granule_rows: int = GRANULE_ROWS) -> None:
        self._granule_rows = granule_rows
        self.rows = array("q")  # first row of each granule
        self.files = array("q")  # index of the file that it starts in
        self.offsets = array("q")  # byte (text) or row (Parquet) in that file
        self.sizes = array("q")  # input bytes of the granule
        self.num_rows = 0

    def add(self, file: int, offset: int, num_bytes: int) -> None:
        """Note one row that starts at ``offset`` of ``file``."""
        full = not self.rows or self.num_rows - self.rows[-1] >= self._granule_rows or self.sizes[-1] >= GRANULE_BYTES
        if full:
            self.rows.append(self.num_rows)
            self.files.append(file)
            self.offsets.append(offset)
            self.sizes.append(0)
        self.sizes[-1] += num_bytes
        self.num_rows += 1

    def __len__(self) -> int:
        return len(self.rows)

    def end_row(self, index: int) -> int:
        """The row after the last one of granule ``index``."""
        return self.rows[index + 1] if index + 1 < len(self.rows) else self.num_rows


class Table(ABC):
    """An input table: one or more files of one format, scanned once, then read window by window.

    The scan has read everything before the object exists, so every error of the table as a whole (encoding, ragged
    rows, shards that disagree) is raised before any work is done. ``digest`` is a hash of the content that was scanned.
    """

    format: ClassVar[Format]
    columns: tuple[str, ...]
    digest: str

    def __init__(self, files: Sequence[Path], *, limit: int | None, granule_rows: int) -> None:
        """``limit``: only so many rows. The subclass scans."""
        self.files = tuple(files)
        self.marks = Marks(granule_rows)
        self.num_bytes = 0
        self._limit = limit

    @property
    def num_rows(self) -> int:
        return self.marks.num_rows

    @property
    def names(self) -> str:
        """The files, for messages."""
        return str(self.files[0]) + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    def _scan(self) -> None:
        digest = hashlib.sha256()
        for index, path in enumerate(self.files):
            if self._limit is not None and self.num_rows >= self._limit:
                break
            self._scan_file(index, path, digest)
        self.digest = digest.hexdigest()
        if not self.num_rows:
            raise InputError(f"{self.names}: the table has no rows")

    def _shorter(self) -> InputError:
        return InputError(f"{self.names}: the input became shorter while it was read; run the job again")

    @abstractmethod
    def _scan_file(self, index: int, path: Path, digest: Hasher) -> None:
        """Check and mark the rows of one file, up to the limit; its content goes into ``digest``."""

    @abstractmethod
    def arrow_schema(self) -> pa.Schema:
        """The schema of the input's columns for a Parquet output.

        Raises InputError where the values of a column have no common type.
        """

    @abstractmethod
    def read(self, mark: int, counts: Sequence[int], columns: frozenset[str] | None = None) -> Iterator[Batch]:
        """Read batches of ``counts`` rows one after another, from granule ``mark`` on.

        ``columns`` limits the Python values that are made; a table that is passed through as Arrow needs few of them.
        """
