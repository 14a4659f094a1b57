"""Lines of UTF-8 text with their byte offsets, from plain or gzip files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Protocol, cast

from ...errors import InputError

MAX_LINE_BYTES = 64 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_MAGIC = {
    b"\x1f\x8b": "it is compressed with gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "it is compressed with Zstandard: decompress it first",
    b"PK\x03\x04": "it is a ZIP archive or an Excel workbook: unpack it, or export it as CSV",
    b"PAR1": "it is Parquet: give --format parquet",
}


class Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...


class LineReader:
    """Iterate over the decoded lines of a file, line ends kept.

    ``offset`` is where the next line starts, in bytes of the decompressed content. Raises InputError for a file that
    cannot be opened, bytes that are not UTF-8 (with their offset), and a line longer than 64 MiB.
    """

    def __init__(self, path: Path, offset: int = 0, hasher: Hasher | None = None) -> None:
        self.path = path
        self.offset = offset
        self.line = 0  # counted from where reading started
        self._hasher = hasher
        self._lines = self._decoded()

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def _decoded(self) -> Iterator[str]:
        with self._open() as file:
            if self.offset:
                file.seek(self.offset)
            try:
                for raw in iter(partial(file.readline, MAX_LINE_BYTES + 1), b""):
                    self.line += 1
                    yield self._decode(raw)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{self.path}: cannot be read beyond byte {self.offset:,}: {error}") from error

    def _decode(self, raw: bytes) -> str:
        if len(raw) > MAX_LINE_BYTES:
            raise InputError(
                f"{self.path}: line {self.line:,} is longer than {MAX_LINE_BYTES:,} bytes; is this a text "
                "table, and is its "
                "format right (--format)?"
            )
        start = self.offset
        self.offset += len(raw)
        if self._hasher:
            self._hasher.update(raw)
        try:
            return (raw.removeprefix(_BOM) if start == 0 else raw).decode()
        except UnicodeDecodeError as error:
            raise InputError(self._not_utf8(raw, start + error.start, error)) from error

    def _not_utf8(self, raw: bytes, at: int, error: UnicodeDecodeError) -> str:
        where = f"{self.path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {at:,}, line {self.line:,}"
        for magic, hint in _MAGIC.items():
            if self.line == 1 and raw.startswith(magic):
                return f"{where}; {hint}"
        looks = raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in raw[:64]
        hint = "it looks like UTF-16" if looks else "it may be Latin-1 or Windows-1252"
        encoding = "UTF-16" if looks else "WINDOWS-1252"
        return f"{where} ({hint}); convert it, for example with `iconv -f {encoding} -t UTF-8`"

    def _open(self) -> IO[bytes]:
        try:
            if self.path.suffix == ".gz":
                return cast(IO[bytes], gzip.open(self.path, "rb"))
            return self.path.open("rb")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be opened: {error.strerror or error}") from error
