"""JSON lines: each row is an object whose text is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError, RowError
from .batch import Batch, Format, Row
from .infer import SchemaInference
from .lines import LineReader
from .text import TextTable

if TYPE_CHECKING:
    import pyarrow as pa

BAD_LINE = "bad_line"  # the column that keeps the text of a line that is not a JSON object
MAX_COLUMNS = 10_000
_BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True)
class JsonLine:
    """One line: its text without the line end, its object, and why it has none."""

    text: str
    value: Row
    error: RowError | None = None


class JsonlTable(TextTable[JsonLine]):
    """JSONL files. A line that is not an object becomes a row with the error ``bad_json`` and its text in ``bad_line``.

    Columns are the union of the objects' keys in order of appearance. Blank lines are skipped. Raises InputError for
    more than 10,000 different keys, and where no line is an object.
    """

    format: ClassVar[Format] = "jsonl"

    def __init__(
        self, files: Sequence[Path], *, limit: int | None, granule_rows: int, infer_schema: bool = False
    ) -> None:
        self._names: dict[str, None] = {}
        self._has_object = False
        self._first_error: RowError | None = None
        self._inference = SchemaInference() if infer_schema else None
        super().__init__(files, limit=limit, granule_rows=granule_rows)
        self.columns = tuple(self._names)
        if not self._has_object:
            raise InputError(
                f"{self.files[0]}: not one of its lines is a JSON object; JSON Lines have one object on each line, "
                f"not a list around them or an object over several lines (the first one: {self._first_error})"
            )

    def arrow_schema(self) -> pa.Schema:
        assert self._inference, "opened without infer_schema"
        return self._inference.schema(self.columns)

    def _records(self, file: int, lines: LineReader) -> Iterator[JsonLine]:
        for line in lines:
            text = line.strip(_BLANK)
            if text:
                yield parse_line(text)

    def _learn(self, record: JsonLine, row: int) -> None:
        self._has_object = self._has_object or record.error is None
        self._first_error = self._first_error or record.error
        if not record.value.keys() <= self._names.keys():
            self._names.update(dict.fromkeys(record.value))
            if len(self._names) > MAX_COLUMNS:
                raise InputError(
                    f"{self.files[0]}: more than {MAX_COLUMNS:,} different keys by row {row + 1:,}; keys are "
                    "column names: put "
                    "changing ones into a nested object"
                )
        if self._inference:
            self._inference.add(record.value, row)

    def _batch(self, records: list[JsonLine], columns: frozenset[str] | None) -> Batch:
        return Batch(
            [record.value for record in records],
            lines=[record.text for record in records],
            errors={i: record.error for i, record in enumerate(records) if record.error},
        )


def parse_line(text: str) -> JsonLine:
    """Read one line. Never raises: what is wrong becomes the row's error."""
    try:
        value = _DECODER.decode(text)
        if not isinstance(value, dict):
            return _bad(text, f"the line is a JSON {type(value).__name__}, not an object")
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair has no UTF-8 form
        return JsonLine(text, value)
    except json.JSONDecodeError as error:
        return _bad(text, f"the line is not JSON: {error.msg} at character {error.pos + 1}")
    except UnicodeEncodeError:
        return _bad(text, "a string of the line holds half of a surrogate pair (\\ud800 to \\udfff)")
    except (ValueError, RecursionError) as error:
        return _bad(text, f"the line is not JSON: {error}")


def _bad(text: str, why: str) -> JsonLine:
    return JsonLine(text, {BAD_LINE: text}, RowError("bad_json", why))


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
