"""``moe-prefill serve`` and ``moe-prefill api-key``."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Annotated, Any

import typer

from ..config import EngineConfig
from ..errors import UsageError
from ..server.settings import ServerConfig, read_settings
from .fields import Flag, given, keyword, make_command, option, parameters_of
from .flags import ENGINE_FLAGS

_HTTP, _QUEUE, _LIMITS = "HTTP", "Queue", "Limits"

SERVER_FLAGS = {
    "host": Flag(help="Address to listen on.", panel=_HTTP),
    "port": Flag(help="Port to listen on; 0: any free one.", panel=_HTTP),
    "served_model_name": Flag(help="Accepted model names; * accepts any. Default: the model's.", panel=_HTTP),
    "tokenizer": Flag(help="Directory or hub id of the tokenizer; default: the model's."),
    "default_max_tokens": Flag(help="0 or 1: what an absent max_tokens means. Default: an error.", panel=_HTTP),
    "rerank_task": Flag(help="Task of kind rank behind /rerank and /score.", metavar="FILE.toml"),
    "classify_task": Flag(help="Task of kind classify behind /classify and /predict.", metavar="FILE.toml"),
    "v1_rerank": Flag(help="Whose reply /v1/rerank gives: vllm (also Cohere's and Jina's) or sglang.", panel=_HTTP),
    "api_keys": Flag(help="File of hashed keys, see moe-prefill api-key.", metavar="FILE.toml", panel=_HTTP),
    "data_dir": Flag(help="Directory of files and batches; without it they are not offered.", panel=_HTTP),
    "max_wait_ms": Flag(help="How long a call waits for more requests when few are there.", panel=_QUEUE),
    "max_sweep_s": Flag(help="Work of one call of the engine, seconds.", panel=_QUEUE),
    "batch_sweep_s": Flag(help="Work of one call for batches, seconds.", panel=_QUEUE),
    "interactive_wait_ms": Flag(help="The same while interactive requests come.", panel=_QUEUE),
    "max_queue_requests": Flag(help="Requests inside at once; more get 429.", panel=_QUEUE),
    "max_queue_tokens": Flag(help="Tokens that wait at most; default: eight sweeps.", panel=_QUEUE),
    "tenant_share": Flag(help="Part of the queue that one of several tenants may fill.", panel=_QUEUE),
    "routing": Flag(help="How several GPUs get requests: ours, another policy, or off.", panel=_QUEUE),
    "max_rows": Flag(help="Texts, documents or prompts of one request.", panel=_LIMITS),
    "max_logprobs": Flag(help="Most likely tokens that may be asked for.", panel=_LIMITS),
    "max_label_ids": Flag(help="Label ids of one request.", panel=_LIMITS),
    "payload_limit_mib": Flag(help="Size of one body.", panel=_LIMITS),
    "file_limit_mib": Flag(help="Size of one uploaded file.", panel=_LIMITS),
    "body_timeout_s": Flag(help="Time in which a body must arrive.", panel=_LIMITS),
    "tokenizer_threads": Flag(help="Threads that tokenise.", panel=_LIMITS),
    "drain_seconds": Flag(help="Time for what is queued when the server is told to stop.", panel=_QUEUE),
    "warmup": Flag(help="Before ready: limit (the largest call), small, or off.", panel=_QUEUE),
    "otlp_endpoint": Flag(help="Send OpenTelemetry spans to this OTLP address.", metavar="URL", panel=_HTTP),
    "log_level": Flag(help="debug, info, warning or error.", panel=_HTTP),
}


def check_extra() -> None:
    """Raise UsageError where the server's packages are missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'moe-prefill[server]'") from None


def _serve(config: str | None, debug: bool, **values: Any) -> None:
    flags = {**given(values, ServerConfig), **given(values, EngineConfig)}
    server, engine = read_settings(flags, os.environ, config)
    check_extra()
    from ..server.run import serve as run

    run(server, replace(engine, keep_prefixes=True))


def _parameters() -> list[Any]:
    config, config_default = option(str | None, None, "--config", metavar="FILE.toml", help="Settings, see docs.")
    debug, debug_default = option(bool, False, "--debug", help="Show the traceback of an error.")
    return [
        keyword("config", config, config_default),
        *parameters_of(ServerConfig, SERVER_FLAGS),
        *parameters_of(EngineConfig, ENGINE_FLAGS),
        keyword("debug", debug, debug_default),
    ]


serve = make_command(_parameters(), _serve, "Serve a model over HTTP: OpenAI, vLLM, SGLang, Cohere and TEI forms.")


def api_key(tenant: Annotated[str, typer.Argument(help="Whose key it is.")]) -> None:
    """Make an API key: it is shown once, and its hash is the entry for the file of --api-keys."""
    from ..server.keys import new_key

    key, entry = new_key(tenant)
    print(f"the key, shown only now: {key}", file=sys.stderr)
    print(entry)
