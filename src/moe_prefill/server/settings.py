"""Settings of the server, from flags, environment and one TOML file, all checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..config import EngineConfig
from ..errors import UsageError

V1Rerank = Literal["vllm", "sglang"]
Warmup = Literal["limit", "small", "off"]
Routing = Literal["ours", "paper", "round-robin", "vllm", "least-tokens", "sglang", "shortest-prefill", "off"]
T = TypeVar("T")
_PREFIX = "MOE_PREFILL_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How to serve. ``None`` means: decided by the engine's plan, or not offered.

    ``served_model_name``: the accepted names, the first is told; default: the model's; ``*`` accepts any.
    ``max_queue_tokens`` None: eight sweeps. ``api_keys`` and the tasks are TOML files. ``data_dir`` holds files and
    batches; without it they are not offered. ``tenant_share`` of the queue is what one tenant may fill, where there
    are several. ``interactive_wait_ms``: for a call of a batch, which is at most that long while interactive requests
    come, else ``batch_sweep_s``. ``routing``: how several workers get their requests, one of ``frontend.POLICIES``;
    "off": each whole sweep to whoever is free.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    tokenizer: str | None = None
    default_max_tokens: int | None = None
    rerank_task: str | None = None
    classify_task: str | None = None
    v1_rerank: V1Rerank = "vllm"
    api_keys: str | None = None
    data_dir: str | None = None
    max_wait_ms: float = 2.0
    max_sweep_s: float = 1.0
    batch_sweep_s: float = 0.25
    interactive_wait_ms: float = 50.0
    max_queue_requests: int = 512
    max_queue_tokens: int | None = None
    tenant_share: float = 0.5
    routing: Routing = "ours"
    max_rows: int = 2048
    max_logprobs: int = 20
    max_label_ids: int = 4096
    payload_limit_mib: float = 8.0
    file_limit_mib: float = 200.0
    body_timeout_s: float = 30.0
    tokenizer_threads: int = 2
    drain_seconds: float = 30.0
    otlp_endpoint: str | None = None
    warmup: Warmup = "limit"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        for name in (
            "max_sweep_s",
            "batch_sweep_s",
            "interactive_wait_ms",
            "max_queue_requests",
            "max_queue_tokens",
            "max_rows",
            "max_label_ids",
            "payload_limit_mib",
            "file_limit_mib",
            "body_timeout_s",
            "tokenizer_threads",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} is {value}; it must be positive")
        for name in ("max_wait_ms", "drain_seconds", "max_logprobs"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port is {self.port}; it is between 0 (any free one) and 65535")
        if self.default_max_tokens not in (None, 0, 1):
            raise UsageError(f"default_max_tokens is {self.default_max_tokens}; this server generates 0 or 1 tokens")
        if not 0 < self.tenant_share <= 1:
            raise UsageError(f"tenant_share is {self.tenant_share}; it is above 0 and at most 1")
        for name, allowed in (
            ("warmup", typing.get_args(Warmup)),
            ("routing", typing.get_args(Routing)),
            ("v1_rerank", typing.get_args(V1Rerank)),
            ("log_level", ("debug", "info", "warning", "error")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")


def read_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str], path: str | None
) -> tuple[ServerConfig, EngineConfig]:
    """Flags win over the environment (MOE_PREFILL_PORT=...), that over the file, that over the defaults.

    The file has the tables [server] and [engine] with the fields of the two configs. Raises UsageError for what is
    unknown or of a wrong type.
    """
    tables = _read_file(path) if path is not None else {}
    unknown = sorted(set(tables) - {"server", "engine"})
    if unknown:
        raise UsageError(f"{path}: has no table {', '.join(unknown)}; its tables are server and engine")
    server = _build(ServerConfig, tables.get("server", {}), environment, flags, path)
    engine = _build(EngineConfig, tables.get("engine", {}), environment, flags, path)
    return server, engine


def _read_file(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: is not valid TOML: {error}") from error


def _build(
    config: type[T], table: object, environment: Mapping[str, str], flags: Mapping[str, Any], path: str | None
) -> T:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: server and engine are tables, [server] and [engine]")
    hints = typing.get_type_hints(config)
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise UsageError(f"{path}: unknown setting {', '.join(unknown)}; there are {', '.join(sorted(fields))}")
    values = {name: _typed(value, hints[name], f"{path}: {name}") for name, value in table.items()}
    for name in fields:
        text = environment.get(_PREFIX + name.upper())
        if text is not None:
            values[name] = _parsed(text, hints[name], _PREFIX + name.upper())
        if flags.get(name) is not None:
            values[name] = tuple(flags[name]) if isinstance(flags[name], list) else flags[name]
    if "model" in fields and "model" not in values:
        raise UsageError("a model is needed: --model, MOE_PREFILL_MODEL, or model in the file's [engine]")
    return config(**values)


def _kind(hint: Any) -> Any:
    """The plain type of a field: str, int, float, bool or tuple."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is Literal:
        return str
    return typing.get_origin(hint) or hint


def _typed(value: object, hint: Any, where: str) -> object:
    kind = _kind(hint)
    if kind is tuple and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{where} is {value!r}; it is of type {kind.__name__}")
    return value


def _parsed(text: str, hint: Any, where: str) -> object:
    kind = _kind(hint)
    if kind is tuple:
        return tuple(part.strip() for part in text.split(","))
    if kind is bool:
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in words:
            raise UsageError(f"{where} is {text!r}; it is true or false")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{where} is {text!r}; it is of type {kind.__name__}") from None
