"""Renders a model's chat template the way transformers' ``apply_chat_template`` does."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ..errors import ModelError, RowError, UsageError

# What an expression of a template raises when messages are not what it expects.
_TEMPLATE_MISTAKES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class ChatTemplate:
    """Messages, mostly one user's and perhaps a system's, to the text that ends with the generation prompt.

    Thinking is off where the template knows ``enable_thinking``. ``today`` is the day a template sees through
    ``strftime_now``: fixed for the whole job, or a job that runs past midnight would change its prompts.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, today: datetime.datetime | None = None
    ) -> None:
        self.source = source
        self.today = today or datetime.datetime.now()
        self._variables = dict(special_tokens)
        try:
            self._template = _environment(self.today).from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template cannot be parsed: {error}") from error

    @classmethod
    def of(cls, template: str | None, special_tokens: Mapping[str, str], date: str | None = None) -> ChatTemplate:
        """Make one from what a tokenizer has; ``date`` is ISO. Raises ModelError without a template."""
        if template is None:
            raise ModelError(
                "the model has no chat template; leave --chat out, or add chat_template.jinja to its directory"
            )
        try:
            today = None if date is None else datetime.datetime.fromisoformat(date)
        except ValueError:
            raise UsageError(f"{date!r} is no date of the form 2026-01-31") from None
        return cls(template, special_tokens, today=today)

    @property
    def reads_date(self) -> bool:
        return "strftime_now" in self.source

    def render(self, user: str, system: str | None = None) -> str:
        """The prompt text. Raises RowError("chat_template") where the template refuses the messages."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": user})
        return self.render_messages(messages)

    def render_messages(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """As ``render``, for a conversation of several messages with ``role`` and ``content``."""
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                enable_thinking=False,
                **self._variables,
            )
        except (jinja2.TemplateError, *_TEMPLATE_MISTAKES) as error:
            raise RowError("chat_template", f"the model's chat template refused the messages: {error}") from error


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
