"""The text of Python values in CSV and JSON."""

from __future__ import annotations

import base64
import json
import math
import re

_QUOTED = re.compile(r'[",\t\r\n]|^\s|\s$')


def json_text(value: object) -> str:
    """JSON without the escapes that UTF-8 does not need. NaN and infinities become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_unusual)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_unusual)


def csv_text(value: object) -> str:
    """A CSV field before quoting: null is empty, lists and objects are JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    return _unusual(value) if isinstance(value, bytes) else json_text(value)


def csv_field(text: str) -> str:
    """Quote a field where a reader could misunderstand it; the same on every Python version, unlike ``csv.writer``."""
    return '"' + text.replace('"', '""') + '"' if _QUOTED.search(text) else text


def _unusual(value: object) -> str:
    assert isinstance(value, bytes), type(value)
    return base64.b64encode(value).decode()


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value
