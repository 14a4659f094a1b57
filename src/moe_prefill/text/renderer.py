"""The process that renders chat templates: a request a line on its input, an answer a line on its output, all JSON.

It is run by its path and imports nothing of ours, so it starts in a moment. Jinja's sandbox keeps a template from this
process's objects; the limits keep it from running or growing without end. They are the kernel's: a template that
computes too long is ended in the middle of whatever it does, and this process with it.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_CPU_S = 1.0  # of one rendering, processor time: a busy machine fails nobody
_MEMORY_BYTES = 1 << 30  # of address space
_TEMPLATES_KEPT = 16

# What an expression of a template raises when messages are not what it expects, or it asks for too much.
_MISTAKES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class _Generation(jinja2.ext.Extension):
    """Templates mark what the assistant says with a ``generation`` block; here its content simply stands."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that jinja reads

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(today: datetime.datetime) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja's own filter escapes HTML, which no model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = today.strftime
    return environment


@functools.lru_cache(_TEMPLATES_KEPT)
def _template(source: str, today: str) -> jinja2.Template:
    return _environment(datetime.datetime.fromisoformat(today)).from_string(source)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """``text``; or ``error``, and ``invalid`` where the template itself cannot be compiled."""
    try:
        template = _template(request["source"], request["today"])
    except _MISTAKES as error:
        return {"invalid": str(error)}
    if "messages" not in request:
        return {"text": ""}
    try:
        text = template.render(
            messages=request["messages"],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            enable_thinking=False,
            **request["variables"],
        )
    except _MISTAKES as error:
        return {"error": str(error) or type(error).__name__}
    return {"text": text}


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who reads the answers
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, _CPU_S)  # SIGPROF ends the process, whatever it is doing
        told = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.buffer.write(json.dumps(told).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
