"""Task files (TOML) and option mappings to typed configs; an unknown key is an error that names it."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TaskError, did_you_mean
from .config import (
    ChooseConfig,
    ClassifyConfig,
    Label,
    RankConfig,
    ScoreConfig,
    SelectConfig,
    TaskConfig,
)

CONFIGS: Mapping[str, type[TaskConfig]] = {
    "classify": ClassifyConfig,
    "choose": ChooseConfig,
    "select": SelectConfig,
    "rank": RankConfig,
    "score": ScoreConfig,
}


def read_task_file(path: str | Path) -> tuple[str, dict[str, object]]:
    """Read a task file: its kind (key ``task``) and its other keys as they stand. Raises TaskError."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TaskError(f"task file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # TOML and UTF-8 errors are ValueErrors
        raise TaskError(f"task file {path} is not valid TOML: {error}") from error
    kind = values.pop("task", None)
    if not isinstance(kind, str):
        raise TaskError(f"task file {path} does not say which task it is; add task = one of {', '.join(CONFIGS)}")
    _check_kind(kind, str(path))
    return kind, values


def config_from_mapping(kind: str, values: Mapping[str, object], source: str = "options") -> TaskConfig:
    """Build the config of task ``kind`` from plain values (strings, numbers, booleans, lists, label tables).

    ``source`` is named in messages. Raises TaskError for an unknown kind or key, or a value of a wrong type.
    """
    _check_kind(kind, source)
    config = CONFIGS[kind]
    known = _hints(kind)
    unknown = sorted(set(values) - set(known))
    if unknown:
        names = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in unknown)
        raise TaskError(f"{source}: {kind} has no key {names}; it has {', '.join(sorted(known))}")
    required = {field.name for field in dataclasses.fields(config) if _is_required(field)}
    missing = sorted(required - set(values))
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise TaskError(f"{source}: {kind} needs {', '.join(missing)}; give {flags}, or the same in a task file")
    checked: dict[str, Any] = {key: _value(value, known[key], f"{source}: {key}") for key, value in values.items()}
    return config(**checked)


def _check_kind(kind: str, source: str) -> None:
    if kind not in CONFIGS:
        raise TaskError(
            f"{source}: unknown task {kind!r}{did_you_mean(kind, CONFIGS)}; it is one of {', '.join(CONFIGS)}"
        )


def load_task_file(path: str | Path) -> TaskConfig:
    """``read_task_file`` and ``config_from_mapping`` in one."""
    kind, values = read_task_file(path)
    return config_from_mapping(kind, values, str(path))


@functools.cache  # a server reads the same ones for every request
def _hints(kind: str) -> Mapping[str, object]:
    return typing.get_type_hints(CONFIGS[kind])


def _is_required(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(value: object, hint: object, where: str) -> object:
    """Check a plain value against a field's type, and turn lists to tuples and label tables to labels."""
    args = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        return None if value is None else _value(value, args[0], where)
    if origin is tuple:
        value = value.tolist() if hasattr(value, "tolist") else value  # of numpy or pandas
        if not isinstance(value, list | tuple):
            raise TaskError(f"{where} is {value!r}; it is a list")
        return tuple(_value(entry, args[0], f"{where}[{i}]") for i, entry in enumerate(value))
    if hint is Label:
        return _label(value, where)
    if origin is typing.Literal:
        hint = str
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()  # a number or a truth value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    assert isinstance(hint, type), hint
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TaskError(f"{where} is {value!r}; it is of type {hint.__name__}")
    if isinstance(value, str):
        _check_unicode(value, where)
    return value


def _check_unicode(text: str, where: str) -> None:
    """Raise TaskError for what UTF-8 does not write, as bytes of a command line that are in another encoding."""
    try:
        text.encode()
    except UnicodeError:
        raise TaskError(f"{where} is {text[:60]!r}, which is no UTF-8; write it in that encoding") from None


def _label(value: object, where: str) -> Label:
    if isinstance(value, Label):
        return value
    if isinstance(value, str):
        return Label(name=typing.cast(str, _value(value, str, where)))
    if not isinstance(value, Mapping):
        raise TaskError(f"{where} is {value!r}; a label is a text or a table with name, word and description")
    known = {field.name for field in dataclasses.fields(Label)}
    unknown = sorted(set(value) - known)
    if unknown or "name" not in value:
        what = f"has no key {', '.join(map(repr, unknown))}" if unknown else "needs a name"
        raise TaskError(f"{where}: a label {what}; its keys are name, word and description")
    return Label(**{key: typing.cast(str, _value(entry, str, f"{where}.{key}")) for key, entry in value.items()})
