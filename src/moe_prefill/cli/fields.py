"""Command-line options from the fields of config dataclasses: types and defaults are written once."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from ..errors import UsageError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """What an option needs beyond its field: help, other names, and the panel of ``--help`` that it stands in."""

    help: str
    names: tuple[str, ...] = ()
    panel: str | None = None
    metavar: str | None = None


def parameters_of(config: type, flags: Mapping[str, Flag]) -> list[inspect.Parameter]:
    """One keyword parameter for each field that has a flag; an option that is not given arrives as None."""
    hints = typing.get_type_hints(config)
    fields = [field for field in dataclasses.fields(config) if field.name in flags]
    return [_parameter(field, hints[field.name], flags[field.name]) for field in fields]


def make_command(parameters: Sequence[inspect.Parameter], run: Callable[..., None], doc: str) -> Callable[..., None]:
    """A function with the given parameters that calls ``run`` with them; its signature is what typer reads."""

    def command(**values: Any) -> None:
        run(**values)

    command.__doc__ = doc
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    return command


def given(values: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The options of ``config`` that were given, lists read."""
    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    present = {name: values[name] for name in names if values.get(name) is not None}
    return {name: read_list(name, value) if _is_tuple(hints[name]) else value for name, value in present.items()}


def read_list(name: str, texts: Sequence[str]) -> list[str]:
    """Values of a list option: repeated, separated by commas, or one JSON list."""
    found: list[str] = []
    for text in texts:
        if text.lstrip().startswith("["):
            found += _json_list(name, text)
        else:
            found += [item.strip() for item in text.split(",")]
    return found


def dashed(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def option(kind: Any, default: Any, *names: str, **settings: Any) -> tuple[Any, Any]:
    """Annotation and default of one option."""
    return Annotated[kind, typer.Option(*names, **settings)], default


def keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(field: dataclasses.Field[Any], hint: Any, flag: Flag) -> inspect.Parameter:
    name = dashed(field.name)
    names = flag.names or ((f"{name}/--no-{name[2:]}",) if hint is bool else (name,))
    settings: dict[str, Any] = {"help": flag.help, "rich_help_panel": flag.panel, "show_default": _shown(field)}
    if flag.metavar or _is_tuple(hint):
        settings["metavar"] = flag.metavar or "A,B,..."
    annotation, default = option(_kind(hint), None, *names, **settings)
    return keyword(field.name, annotation, default)


def _kind(hint: Any) -> Any:
    """The type that typer parses: optional always, lists for tuples."""
    plain = _without_none(hint)
    return list[str] | None if _is_tuple(plain) else plain | None


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(_without_none(hint)) is tuple


def _shown(field: dataclasses.Field[Any]) -> str | bool:
    """The default for ``--help``, read from the field."""
    unset = field.default is dataclasses.MISSING or field.default in (None, False, (), "")
    return False if unset else str(field.default)


def _json_list(name: str, text: str) -> list[str]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{dashed(name)} starts with [ but is not a JSON list: {error}") from error
    if not all(isinstance(value, str) for value in values):
        raise UsageError(f"{dashed(name)} is {text}; its items must be strings")
    return list(values)
