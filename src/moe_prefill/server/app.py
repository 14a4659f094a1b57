"""HTTP: bodies in with their limits, answers out with their headers. What is answered is ``service``'s matter."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .endpoints import ENDPOINTS, Endpoint
from .keys import ANYONE, Caller, Keys
from .metrics import Metrics
from .refusals import Refused, overloaded
from .schema import describe
from .service import Answer, Service, failed, refusal
from .tokens import tokenizer_info
from .tracing import NoTracer, Tracer

_log = logging.getLogger("moe_prefill.server.access")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_BATCHES = re.compile(r"/v1/(files|batches)\b")
_PAGE = Path(__file__).with_name("status.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Of one request: bytes of its body, and seconds in which all of it must arrive and its reply be taken; and the
    bytes of all bodies that are inside at once.
    """

    payload_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    all_bodies_bytes: int = 512 << 20


Handler = Callable[[Request, Caller, str], Awaitable[Answer]]


class Door:
    """What every route goes through: request id, key, answer, headers, counting, one line in the log."""

    def __init__(
        self, service: Service, metrics: Metrics, keys: Keys | None, limits: HttpLimits, tracer: Tracer
    ) -> None:
        self.tracer = tracer
        self.service = service
        self.metrics = metrics
        self.keys = keys
        self.limits = limits
        self._bodies_bytes = 0  # of those inside

    async def open(self, request: Request, path: str, handler: Handler) -> Response:
        begin_ns, begin_s = time.time_ns(), time.monotonic()
        given = request.headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(16)
        try:
            answer = await handler(request, self.caller(request), request_id)
        except Exception as error:
            answer = failed(error, request_id)
        self.metrics.replied(path, answer, request_id, datetime.now(UTC).isoformat(timespec="seconds"))
        self.tracer.replied(path, answer, request_id, request.headers, begin_ns, time.time_ns())
        facts = {
            "request_id": request_id,
            "method": request.method,
            "path": path,
            "status": answer.status,
            "code": answer.code,
            "seconds": round(time.monotonic() - begin_s, 6),
            "prompt_tokens": answer.prompt_tokens,
        }
        _log.info("request", extra={"facts": facts})
        return respond(answer, request_id)

    def caller(self, request: Request) -> Caller:
        """Who calls. Raises 401."""
        return ANYONE if self.keys is None else self.keys.caller(request.headers.get("authorization"))

    async def ask(self, endpoint: Endpoint, request: Request, caller: Caller, request_id: str) -> Answer:
        """Read a body and have it answered; when the client goes, its work leaves the queue."""
        with self._room(request):
            return await self._answered(endpoint, request, caller, request_id)

    @contextlib.contextmanager
    def _room(self, request: Request) -> Iterator[None]:
        """Room for a body, by the size that it states or may have. Raises 429 where there is none."""
        length = request.headers.get("content-length", "")
        size = min(int(length) if length.isdecimal() else self.limits.payload_bytes, self.limits.payload_bytes)
        if self._bodies_bytes + size > self.limits.all_bodies_bytes:
            message = f"bodies of {self._bodies_bytes} bytes are inside, the limit is {self.limits.all_bodies_bytes}"
            raise overloaded(message, self.service.scheduler.retry_after_s())
        self._bodies_bytes += size
        try:
            yield
        finally:
            self._bodies_bytes -= size

    async def _answered(self, endpoint: Endpoint, request: Request, caller: Caller, request_id: str) -> Answer:
        body = await read_body(request, self.limits)
        task = asyncio.current_task()
        assert task is not None
        gone = asyncio.ensure_future(_gone(request.receive, task))
        try:
            return await self.service.answer(endpoint, body, caller=caller, request_id=request_id)
        except asyncio.CancelledError:
            if not gone.done() or task.uncancel():  # someone else wants the end of this task
                raise
            return Answer(status=499, body=b"", code="client_gone")
        finally:
            gone.cancel()

    def visible(self, request: Request) -> None:
        """Let loopback addresses and callers with a key read what is about the server itself. Raises 401 and 403."""
        if _is_loopback(request):
            return
        if self.keys is None:
            raise Refused(
                403, "not_loopback", "this page is for this machine's own addresses, or for callers with a key"
            )
        self.caller(request)


def check_plain(request: Request) -> None:
    """Raise 415 for a compressed body: a small one may be without end when it is unpacked."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "compressed_body", "compressed bodies are not read; send it as it is")


async def read_body(request: Request, limits: HttpLimits) -> bytes:
    """The whole body. Raises 413, 415 for one that is compressed, and 408 for one that does not come."""
    check_plain(request)
    limit = limits.payload_bytes
    too_large = Refused(
        413, "payload_too_large", f"the body is larger than {limit} bytes; send less, or raise --payload-limit-mib"
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refused(408, "slow_body", f"the body did not arrive within {limits.body_timeout_s} s") from None
    return b"".join(parts)


def respond(answer: Answer, request_id: str) -> Response:
    """Headers of an answer: TEI's timings are whole milliseconds."""
    times = answer.timings
    headers = {
        "x-request-id": request_id,
        "x-total-time": str(round(times.total_s * 1000)),
        "x-tokenization-time": str(round(times.tokenize_s * 1000)),
        "x-queue-time": str(round(times.queue_s * 1000)),
        "x-inference-time": str(round(times.inference_s * 1000)),
        "x-compute-time": str(round(times.inference_s * 1000)),
        "x-compute-tokens": str(answer.prompt_tokens),
    }
    if answer.retry_after_s is not None:
        headers["retry-after"] = str(answer.retry_after_s)
    if answer.status == 401:
        headers["www-authenticate"] = 'Basic realm="moe-prefill", charset="UTF-8"'
    return Response(answer.body, answer.status, headers, media_type="application/json")


def make_app(
    service: Service,
    metrics: Metrics,
    keys: Keys | None,
    limits: HttpLimits,
    tracer: Tracer = NoTracer(),  # noqa: B008 (without state)
) -> FastAPI:
    """All routes but those of files and batches."""
    app = FastAPI(title="MoE-Prefill scoring server", docs_url=None, redoc_url=None)
    door = Door(service, metrics, keys, limits, tracer)
    app.state.door = door
    for endpoint in ENDPOINTS:
        for path in endpoint.paths:
            app.add_route(path, _asking(door, endpoint, path), methods=["POST"], name=path)
    _add_model_routes(app, door)
    _add_operation_routes(app, door)
    app.add_exception_handler(HTTPException, _not_ours)
    app.add_middleware(SlowReaders, seconds=limits.body_timeout_s)
    describe(app, ENDPOINTS)
    return app


def _asking(door: Door, endpoint: Endpoint, path: str) -> Callable[[Request], Awaitable[Response]]:
    async def ask(request: Request) -> Response:
        return await door.open(request, path, lambda *given: door.ask(endpoint, *given))

    return ask


def _add_model_routes(app: FastAPI, door: Door) -> None:
    context = door.service.context

    def model_card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": context.created,
            "owned_by": "moe-prefill",
            "root": context.name,
            "parent": None,
            "max_model_len": context.limits.max_request_tokens,
        }

    @app.get("/v1/models", summary="The names of the model.")
    async def models(request: Request) -> Response:
        async def handle(request: Request, caller: Caller, request_id: str) -> Answer:
            names = [name for name in context.names if name != "*"]
            return _json({"object": "list", "data": [model_card(name) for name in names]})

        return await door.open(request, "/v1/models", handle)

    @app.get("/v1/models/{name:path}", summary="One name of the model.")
    async def model(request: Request, name: str) -> Response:
        async def handle(request: Request, caller: Caller, request_id: str) -> Answer:
            context.check_model(name)
            return _json(model_card(name))

        return await door.open(request, "/v1/models/{name}", handle)

    @app.get("/tokenizer_info", summary="The tokenizer's special tokens and chat template.")
    async def tokenizer(request: Request) -> Response:
        async def handle(request: Request, caller: Caller, request_id: str) -> Answer:
            return _json(tokenizer_info(context))

        return await door.open(request, "/tokenizer_info", handle)


def _add_operation_routes(app: FastAPI, door: Door) -> None:
    scheduler = door.service.scheduler

    @app.get("/health", summary="Whether the engine is alive.")
    @app.head("/health", include_in_schema=False)  # as load balancers ask
    async def health() -> Response:
        return _state(503 if scheduler.state == "failed" else 200, scheduler.state)

    @app.get("/ready", summary="Whether requests are taken in.")
    @app.head("/ready", include_in_schema=False)  # as load balancers ask
    async def ready() -> Response:
        return _state(200 if scheduler.state == "ready" else 503, scheduler.state)

    def shown(request: Request, make: Callable[[], Response]) -> Response:
        try:
            door.visible(request)
        except Refused as error:
            return respond(refusal(error), secrets.token_hex(16))
        return make()

    @app.get("/metrics", summary="Counters in Prometheus' text form.")
    async def metrics(request: Request) -> Response:
        return shown(request, lambda: Response(door.metrics.text(), media_type="text/plain; version=0.0.4"))

    @app.get("/status.json", summary="What the status page shows.")
    async def status(request: Request) -> Response:
        def make() -> Response:
            facts = {"model": door.service.context.name, **door.metrics.status()}
            return Response(json.dumps(facts), media_type="application/json")

        return shown(request, make)

    @app.get("/", summary="The status page.", include_in_schema=False)
    async def page(request: Request) -> Response:
        return shown(request, lambda: Response(_PAGE.read_bytes(), headers=_PAGE_HEADERS, media_type="text/html"))


class SlowReaders:
    """Closes the connection of a client that does not take its reply in time, which would keep it in memory."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def timely(message: Message) -> None:
            async with asyncio.timeout(self._seconds):
                await send(message)

        await self._app(scope, receive, timely)


def _state(status: int, state: str) -> Response:
    headers = {"retry-after": "5"} if status != 200 else {}
    return Response(json.dumps({"status": state}), status, headers, media_type="application/json")


def _json(value: object) -> Answer:
    return Answer(status=200, body=json.dumps(value).encode())


async def _not_ours(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        batches = "; files and batches need --data-dir" if _BATCHES.match(request.url.path) else ""
        message = f"there is no {request.url.path[:80]} here{batches}; /openapi.json lists all paths"
        refused = Refused(404, "not_found", message)
    else:
        refused = Refused(error.status_code, "bad_method", f"{request.method} is not what this path takes, see Allow")
    response = respond(refusal(refused), secrets.token_hex(16))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _gone(receive: Receive, task: asyncio.Task[object]) -> None:
    """Cancel the task when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _is_loopback(request: Request) -> bool:
    """A proxy on this machine is no loopback client: it names whom it speaks for."""
    if any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip")):
        return False
    with contextlib.suppress(ValueError):
        return request.client is not None and ip_address(request.client.host).is_loopback
    return False
