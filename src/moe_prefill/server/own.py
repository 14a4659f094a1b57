"""This server's own endpoints: rows and a task's options in, the columns that the task would add to a table out.

The body holds the keys of a task file (see ``tasks.config``) beside ``rows``; each row is a text or an object of the
template's columns. A row that cannot be answered carries its error and leaves the others alone.
"""

from __future__ import annotations

import dataclasses
import typing
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, create_model

from ..core import PreparedRow
from ..errors import RowError
from ..tasks import Label, Task, TaskConfig, config_from_mapping
from ..tasks.taskfile import CONFIGS
from .bodies import Body
from .context import Context, Plan, Results, good, usage
from .refusals import bad_request

_NOT_HERE = ("output_prefix",)  # of tables

_ROWS = WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}, "minItems": 1})
_LABELS = WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}, "minItems": 1})


def body_of(kind: str) -> type[Body]:
    """The body of one task: its config's fields and ``rows``, for the documentation of the API."""
    config = CONFIGS[kind]
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {"rows": (Annotated[Any, _ROWS], ...)}
    for one in dataclasses.fields(config):
        if one.name in _NOT_HERE:
            continue
        hint = Annotated[Any, _LABELS] if hints[one.name] == tuple[Label, ...] else hints[one.name]
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        fields[one.name] = (hint, ... if required else Field(one.default))
    name = f"{kind.capitalize()}Rows"
    return create_model(name, __base__=Body, __config__=None, __doc__=config.__doc__, **fields)


def answer(kind: str, context: Context, raw: dict[str, Any]) -> Plan:
    """Plan a body of ``rows`` for a task of this kind."""
    values = dict(raw)
    model, rows = values.pop("model", None), values.pop("rows", None)
    for name in ("user", "cache_salt"):
        values.pop(name, None)
    if any(name in values for name in _NOT_HERE):
        raise bad_request("bad_task", f"{', '.join(_NOT_HERE)} belongs to tables; leave it out", _NOT_HERE[0])
    config = config_from_mapping(kind, values, "body")
    task = context.task(config)
    prepared = task.prepare(_table(context, rows, config, task))
    requests = [request for row in prepared if isinstance(row, PreparedRow) for request in row.requests]

    def finish(results: Results) -> object:
        data, start = [], 0
        for index, row in enumerate(prepared):
            size = len(row.requests) if isinstance(row, PreparedRow) else 0
            data.append({"index": index, **_values(task, row, results[start : start + size])})
            start += size
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "object": kind,
            "model": model or context.name,
            "data": data,
            "usage": usage(sum(len(request.tokens) for request in requests)),
        }

    return Plan(requests, finish)


def _table(context: Context, rows: object, config: TaskConfig, task: Task) -> list[Mapping[str, object]]:
    if not isinstance(rows, list) or not all(isinstance(row, str | dict) for row in rows):
        raise bad_request("bad_rows", "rows is a list of texts, or of objects of the template's columns", "rows")
    context.check_rows(len(rows), "rows")
    table: list[Mapping[str, object]] = [row if isinstance(row, dict) else {config.text_column: row} for row in rows]
    known = {name for row in table for name in row}
    missing = sorted(task.placeholders - known)
    if missing:
        raise bad_request(
            "bad_rows",
            f"no row has {', '.join(map(repr, missing))}, which the prompt reads; the rows have "
            f"{', '.join(map(repr, sorted(known)[:20]))}",
            "rows",
        )
    return table


def _values(task: Task, row: PreparedRow | RowError, results: Results) -> dict[str, object]:
    error = row if isinstance(row, RowError) else next((r for r in results if isinstance(r, RowError)), None)
    if error is not None:
        return {"error": {"code": error.code, "message": str(error)}}
    assert isinstance(row, PreparedRow)
    return task.finish(row, good(results))
