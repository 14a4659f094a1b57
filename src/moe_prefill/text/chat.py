"""Renders a model's chat template the way transformers' ``apply_chat_template`` does, in a process of its own.

A template is a program that comes with a model. It runs in Jinja's sandbox, in a process that is ended when it computes
too long or wants too much memory (``renderer``), so no template holds up or harms who asks.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_prefill.errors import ModelError, RowError, UsageError

_PROGRAM = Path(__file__).with_name("renderer.py")


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
        self._fixed = {"source": source, "variables": dict(special_tokens), "today": self.today.isoformat()}
        told = _renderer.ask(self._fixed)
        if "text" not in told:
            why = told.get("invalid") or told["error"]
            raise ModelError(f"the model's chat template cannot be parsed: {why}")

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
        told = _renderer.ask({**self._fixed, "messages": messages})
        if "text" not in told:
            why = told.get("invalid") or told["error"]
            raise RowError("chat_template", f"the model's chat template refused the messages: {why}")
        return told["text"]


class _Renderer:
    """The process, started when it is first needed and again after it ended. Thread-safe: one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # process id: a fork of this one must not read the answers of its parent

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """``text``, or why there is none."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # it may have been ended while nobody asked
                told, status = self._exchange(line)
                if told:
                    return dict(json.loads(told))
                if status == -signal.SIGPROF:
                    return {"error": "it did not end in the processor time that a rendering may take"}
        return {"error": f"the process that renders it ended with status {status}"}

    def _exchange(self, line: bytes) -> tuple[bytes, int]:
        """The answer; or none, and the exit status of the process."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
        told = process.stdout.readline()
        if told:
            return told, 0
        self._process = None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return b"", process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():
            # -P: the modules beside the program are not its imports.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._process


_renderer = _Renderer()  # one for all templates of this process; it ends when its input does
