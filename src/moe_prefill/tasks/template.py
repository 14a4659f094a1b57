"""Prompt templates: text with ``{column}`` placeholders, and a row's values as text."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..errors import RowError, TaskError, did_you_mean
from .base import Row


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: literal texts around placeholder names, ``literals[i] names[i] literals[i + 1]``."""

    source: str
    literals: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, source: str) -> Template:
        """Read ``{name}`` placeholders; ``{{`` and ``}}`` stand for braces. Raises TaskError with the place."""
        literals, names, text, i = [], [], "", 0
        while i < len(source):
            pair = source[i : i + 2]
            if pair in ("{{", "}}"):
                text += pair[0]
                i += 2
            elif source[i] == "{":
                end = source.find("}", i)
                name = source[i + 1 : end].strip()
                if end < 0 or not name or "{" in name:
                    raise _brace_error(source, i)
                literals.append(text)
                names.append(name)
                text, i = "", end + 1
            elif source[i] == "}":
                raise _brace_error(source, i)
            else:
                text += source[i]
                i += 1
        return cls(source, (*literals, text), tuple(names))

    def render(self, fields: Mapping[str, str]) -> str:
        parts = [self.literals[0]]
        for name, literal in zip(self.names, self.literals[1:], strict=True):
            parts.append(fields[name])
            parts.append(literal)
        return "".join(parts)

    @property
    def ends_with_space(self) -> bool:
        return self.literals[-1][-1:].isspace()


def columns_of(templates: Sequence[Template], reserved: Collection[str]) -> frozenset[str]:
    """The input columns that templates read: all their placeholders but the task's own ones."""
    return frozenset(name for template in templates for name in template.names) - frozenset(reserved)


def check_columns(needed: Collection[str], columns: Sequence[str] | None, reserved: Collection[str] = ()) -> None:
    """Raise TaskError that names what is missing and what there is, and where no column is ``needed``."""
    if not needed:
        raise TaskError("the prompt reads no column, so every row would get one answer; name columns as {column}")
    if columns is None:
        return
    missing = sorted(set(needed) - set(columns))
    if missing:
        own = f", and this task's own {', '.join(f'{{{name}}}' for name in sorted(reserved))}" if reserved else ""
        names = ", ".join(f"{name!r}{did_you_mean(name, columns)}" for name in missing)
        raise TaskError(
            f"the table has no column {names}; it has {', '.join(columns[:30])}{own}. Name one of "
            f"them in the template as {{column}}, or the text column with --text-column{delimiter_remark(columns)}"
        )


def delimiter_remark(columns: Sequence[str]) -> str:
    """What a header that is one long name may mean, or nothing."""
    found = next((mark for mark in (";", "\t", "|") if len(columns) == 1 and mark in columns[0]), None)
    if found is None:
        return ""
    remedy = "give --format tsv" if found == "\t" else "write the table with commas"
    return f". {found!r} stands in its only name: if it is the delimiter, {remedy}"


def fields_of(row: Row, names: Collection[str]) -> dict[str, str]:
    """The named values as text. Raises RowError for a null, a text of nothing but white space, or broken Unicode."""
    return {name: need_text(row.get(name), f"column {name!r}") for name in sorted(names)}


def need_text(value: object, where: str) -> str:
    """A value as text that can be tokenised. Raises RowError("empty_text") or RowError("bad_text")."""
    text = as_text(value)
    if not text.strip():
        raise RowError(
            "empty_text", f"{where} is {'null' if value is None else 'empty'}; the prompt needs a text there"
        )
    try:
        (value if isinstance(value, bytes) else text.encode()).decode()
    except UnicodeError as error:
        raise RowError("bad_text", f"{where} is not UTF-8 text: {error}; repair the text") from error
    return text


def as_text(value: object) -> str:
    """A value as a table shows it: numbers as they are, booleans in lower case, dates in ISO form, lists as JSON.

    What stands for a missing value, None, not-a-number and pandas' NA and NaT, is an empty text.
    """
    if isinstance(value, str):
        return value
    value = _unpacked(value)
    if value is None or _is_missing(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=_for_json)
    return str(value)


def _unpacked(value: object) -> object:
    """An array, of numpy or torch, as the list that it holds; its own text leaves out what is in its middle."""
    return value.tolist() if getattr(value, "ndim", 0) and hasattr(value, "tolist") else value


def _for_json(value: object) -> object:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _is_missing(value: object) -> bool:
    """Whether a value is unequal to itself, as all that is not a number is; NA refuses to say so."""
    try:
        return bool(value != value)
    except (TypeError, ValueError):  # of an array the truth has no one value
        return type(value).__name__ == "NAType"


def list_of(row: Row, column: str) -> list[object]:
    """A list from a list column, or from a JSON list in a text column. Raises RowError("bad_list")."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("bad_list", f"column {column!r} is no JSON list: {error}") from error
    value = _unpacked(value)
    if value is None:
        raise RowError("empty_text", f"column {column!r} is null; a list is needed there")
    if not isinstance(value, list | tuple | range):
        raise RowError("bad_list", f"column {column!r} holds {str(value)[:40]!r}; a list is needed there")
    return [_unpacked(entry) for entry in value]


def texts_of(row: Row, column: str) -> list[str]:
    """A list of non-empty texts. Raises RowError."""
    return [need_text(value, f"entry {i} of column {column!r}") for i, value in enumerate(list_of(row, column))]


def _brace_error(source: str, at: int) -> TaskError:
    return TaskError(
        f"the template has a stray {source[at]!r} at character {at} ({source[max(0, at - 10) : at + 10]!r}); "
        "a placeholder is {column}, and a brace itself is written {{ or }}"
    )
