"""Lines of batch files in OpenAI's form: requests in, replies out."""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic_core import from_json, to_json

from .endpoints import BY_PATH, Endpoint
from .refusals import Refused, bad_request
from .service import Answer, refusal

_MAX_ID = 512  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One request of a file. ``refused``: it is none, and why; ``custom_id`` is then what could be read of it."""

    number: int  # from 1
    custom_id: str | None
    endpoint: Endpoint | None = None
    path: str = ""
    body: bytes = b""
    refused: Refused | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive lines of a file, and the place in it where the next ones begin."""

    lines: list[Line]
    end: int


def read_chunks(path: Path, start: int, first_number: int, max_lines: int, max_bytes: int) -> Iterator[Chunk]:
    """Lines from byte ``start`` on, a bounded number at a time; which lines are together depends on the file alone,
    where ``start`` is an end of an earlier chunk. Blank lines are skipped. A line alone may be longer than the bounds.
    """
    with path.open("rb") as file:
        file.seek(start)
        number = first_number
        while True:
            lines: list[Line] = []
            size = 0
            for raw in _raw_lines(file, max_bytes):
                size += len(raw)
                if raw.strip():
                    lines.append(parse_line(number, raw))
                    number += 1
                if len(lines) >= max_lines or size >= max_bytes:
                    break
            if not size:
                return
            yield Chunk(lines, file.tell())


def parse_line(number: int, raw: bytes) -> Line:
    """Read {"custom_id", "method", "url", "body"}; what is wrong with it becomes its ``refused``."""
    try:
        value = from_json(raw.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        return _refused(number, None, bad_request("bad_json", f"line {number} is not valid JSON: {error}"))
    if not isinstance(value, dict):
        return _refused(number, None, bad_request("bad_line", f"line {number} is no JSON object"))
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID:
        message = f"line {number} needs a custom_id, a text of at most {_MAX_ID} characters"
        return _refused(number, None, bad_request("bad_line", message, "custom_id"))
    if value.get("method", "POST") != "POST":
        return _refused(number, custom_id, bad_request("bad_line", f"line {number}: method is POST", "method"))
    if not isinstance(url, str) or url not in BY_PATH:
        message = f"line {number}: url is {str(url)[:80]!r}; it is one of {', '.join(BY_PATH)}"
        return _refused(number, custom_id, bad_request("bad_url", message, "url"))
    if not isinstance(body, dict):
        return _refused(number, custom_id, bad_request("bad_line", f"line {number}: body is an object", "body"))
    return Line(number=number, custom_id=custom_id, endpoint=BY_PATH[url], path=url, body=to_json(body))


def reply_line(line: Line, answer: Answer) -> bytes:
    """The reply to one line. A line that is no request has ``response`` null and its ``error``."""
    told: dict[str, object] = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.custom_id,
        "response": None,
        "error": None,
    }
    if line.refused is not None:
        told["error"] = {"code": line.refused.code, "message": str(line.refused)}
    else:
        told["response"] = {
            "status_code": answer.status,
            "request_id": secrets.token_hex(16),
            "body": from_json(answer.body),
        }
    return to_json(told, inf_nan_mode="null") + b"\n"


def refused_answer(line: Line) -> Answer:
    assert line.refused is not None
    return refusal(line.refused)


def _refused(number: int, custom_id: str | None, refused: Refused) -> Line:
    return Line(number=number, custom_id=custom_id, refused=refused)


def _raw_lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Lines of a file; of one that is longer than 16 chunks only the beginning is kept, which is no valid JSON."""
    limit = 16 * max_bytes
    while raw := file.readline(limit):
        while len(raw) == limit and not raw.endswith(b"\n") and (rest := file.readline(limit)):
            if rest.endswith(b"\n"):
                break
        yield raw
