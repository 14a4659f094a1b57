"""Arrow types for JSON values, found in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_EXACT = 2**53  # integers up to here are floats without loss


@dataclass(slots=True)
class _Node:
    """What is known of one place (a column, a list's items, a field): its kind and the row that showed it."""

    kind: str = "null"  # null, bool, integer, number, string, list or object
    row: int = 0
    low: int = 0
    high: int = 0
    extreme_row: int = 0  # of the integer furthest from zero
    item: _Node | None = None
    fields: dict[str, _Node] = field(default_factory=dict)


class SchemaInference:
    """Unify the types of JSON objects row by row.

    null joins everything; integers and fractions become float64 where no integer loses digits; fields of nested
    objects are united. Everything else that differs raises InputError with the column, both types and both rows.
    """

    def __init__(self) -> None:
        self._root = _Node("object")

    def add(self, row_values: dict[str, object], row: int) -> None:
        """Take in the object of row ``row`` (from 0). Raises InputError."""
        for name, value in row_values.items():
            _merge(self._root.fields.setdefault(name, _Node()), value, row, name)

    def schema(self, columns: Iterable[str]) -> pa.Schema:
        """The types found so far, of these columns. Raises InputError for one that Parquet cannot hold."""
        import pyarrow as pa

        return pa.schema([(name, _arrow(self._root.fields[name], name)) for name in columns])


def _merge(node: _Node, value: object, row: int, path: str) -> None:
    if value is None:
        return
    kind = _kind(value)
    if node.kind == "null":
        node.kind, node.row = kind, row
    elif node.kind != kind:
        if {node.kind, kind} != {"integer", "number"}:
            raise _conflict(path, node.kind, node.row, kind, row)
        node.kind, node.row = "number", row if kind == "number" else node.row
    if isinstance(value, int) and kind == "integer":
        _widen(node, value, row)
    elif isinstance(value, list):
        node.item = node.item or _Node()
        for item in value:
            _merge(node.item, item, row, f"{path}[]")
    elif isinstance(value, dict):
        for name, inner in value.items():
            _merge(node.fields.setdefault(name, _Node()), inner, row, f"{path}.{name}")


def _widen(node: _Node, value: int, row: int) -> None:
    if value < node.low or value > node.high:
        if abs(value) > max(-node.low, node.high):
            node.extreme_row = row
        node.low, node.high = min(node.low, value), max(node.high, value)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "list" if isinstance(value, list) else "object"


def _arrow(node: _Node, path: str) -> pa.DataType:
    import pyarrow as pa

    simple = {"null": pa.string(), "bool": pa.bool_(), "string": pa.string()}
    if node.kind in simple:
        return simple[node.kind]
    if node.kind == "integer":
        return _integer(node, path)
    if node.kind == "number":
        if max(-node.low, node.high) > _EXACT:
            raise _conflict(path, "an integer beyond 2^53", node.extreme_row, "number", node.row)
        return pa.float64()
    if node.kind == "list":
        return pa.list_(_arrow(node.item or _Node(), f"{path}[]"))
    if not node.fields:
        raise InputError(f"column {path!r} holds only empty objects, which Parquet cannot keep; {_REMEDY}")
    return pa.struct([(name, _arrow(inner, f"{path}.{name}")) for name, inner in node.fields.items()])


def _integer(node: _Node, path: str) -> pa.DataType:
    import pyarrow as pa

    if node.low >= -(2**63) and node.high < 2**63:
        return pa.int64()
    if node.low >= 0 and node.high < 2**64:
        return pa.uint64()
    raise InputError(
        f"column {path!r} holds integers from {node.low} to {node.high} (row {node.extreme_row + 1:,}), more "
        "than 64 bits; "
        f"{_REMEDY}"
    )


_REMEDY = "write JSONL or CSV instead (-o NAME.jsonl), or make the values alike, for example all strings"


def _conflict(path: str, kind_a: str, row_a: int, kind_b: str, row_b: int) -> InputError:
    return InputError(
        f"column {path!r} has no common type for Parquet: {kind_a} in row {row_a + 1:,}, {kind_b} in row "
        f"{row_b + 1:,}; "
        f"{_REMEDY}"
    )
