"""From settings to a server that listens, and its end: drained on SIGTERM, at once on a second one."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..config import EngineConfig
from ..core import EngineLimits, ScoringEngine
from ..errors import TaskError, UsageError
from ..tasks import ClassifyConfig, RankConfig, load_task_file
from .app import HttpLimits, make_app
from .batchroutes import add_batch_routes
from .batchrunner import BatchRunner
from .context import Allowances, Context
from .keys import Keys
from .logs import set_up
from .metrics import Metrics
from .scheduler import Policy, Scheduler
from .service import Service
from .settings import ServerConfig
from .store import Store
from .tracing import Tracer, tracer_of
from .warmup import keep_heap, warm_up

if TYPE_CHECKING:
    from ..text import Tokenizer

_log = logging.getLogger(__name__)
_SWEEPS_QUEUED = 8
_HUGE = 2**31 - 1
UNBOUNDED = EngineLimits(max_request_tokens=_HUGE, max_sweep_tokens=_HUGE, vocab_size=_HUGE)  # before there is a plan
_LAST_REPLIES_S = 5.0  # for replies that are being written when the queue is empty


def serve(server: ServerConfig, engine: EngineConfig) -> None:
    """Load the model and serve until SIGTERM. Raises what is wrong with settings and model before listening."""
    set_up(server.log_level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of our own do it; more cost more than they help
    keys, tracer = Keys.read(server.api_keys), tracer_of(server.otlp_endpoint)
    context_of = prepare(server, engine)
    with (
        closing(tracer),
        closing(bind(server.host, server.port)) as listener,
        closing(build_serving(server, engine)) as scoring,
    ):
        service, metrics = assemble(server, scoring, context_of(scoring.limits), keys)
        Drained(server, service, metrics, keys, tracer).run(sockets=[listener])


def build_serving(server: ServerConfig, engine: EngineConfig) -> ScoringEngine:
    """The engine: with several processes, one that routes requests to them one by one."""
    from .. import workers

    if engine.gpus is None or engine.strategy != "asyncep" or server.routing == "off":
        return workers.build_scoring(engine)
    routing = workers.Routing(
        policy=server.routing, max_sweep_s=server.max_sweep_s, max_wait_s=server.max_wait_ms / 1000
    )
    return workers.RoutedEngine(engine, routing)


def bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded; it listens only when someone can answer. Raises UsageError."""
    listener = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error
    return listener


class _ContextOf:
    """A context but for the limits, which only the engine knows; tokenizer and tasks are checked before it loads."""

    def __init__(self, server: ServerConfig, engine: EngineConfig) -> None:
        self._names = server.served_model_name or model_names(engine.model)
        self._tokenizer = read_tokenizer(server.tokenizer, engine)
        self._rerank = _rerank_task(server.rerank_task)
        self._classify = _classify_task(server.classify_task)
        self._v1_rerank = server.v1_rerank
        self._allow = Allowances(
            max_rows=server.max_rows,
            max_logprobs=server.max_logprobs,
            max_label_ids=server.max_label_ids,
            default_max_tokens=server.default_max_tokens,
        )

    def __call__(self, limits: EngineLimits) -> Context:
        return Context(
            tokenizer=self._tokenizer,
            limits=limits,
            names=self._names,
            allow=self._allow,
            rerank=self._rerank,
            classify=self._classify,
            v1_rerank=self._v1_rerank,
            created=int(time.time()),
        )


def prepare(server: ServerConfig, engine: EngineConfig) -> _ContextOf:
    """Read tokenizer and tasks, and check the tasks against a model without bounds. Raises what is wrong."""
    context_of = _ContextOf(server, engine)
    context = context_of(UNBOUNDED)
    context.task(context.rerank)
    if context.classify is not None:
        context.task(context.classify)
    return context_of


def assemble(
    server: ServerConfig, scoring: ScoringEngine, context: Context, keys: Keys | None
) -> tuple[Service, Metrics]:
    """Scheduler, service and metrics around an engine; nothing runs yet."""
    max_tokens = server.max_queue_tokens or _SWEEPS_QUEUED * scoring.limits.max_sweep_tokens
    policy = Policy(
        max_queue_tokens=max(max_tokens, scoring.limits.max_request_tokens),
        max_queue_requests=server.max_queue_requests,
        max_wait_s=server.max_wait_ms / 1000,
        max_sweep_s=server.max_sweep_s,
        batch_sweep_s=server.batch_sweep_s,
        interactive_wait_s=server.interactive_wait_ms / 1000,
        tenant_share=server.tenant_share if keys is not None and keys.num_tenants > 1 else 1.0,
    )
    scheduler = Scheduler(scoring, policy)
    return Service(context, scheduler, threads=server.tokenizer_threads), Metrics(scheduler)


def model_names(model: str) -> tuple[str, ...]:
    """What clients may call a model that was given as a hub id or a directory: all of it, or its last part."""
    return tuple(dict.fromkeys((model, Path(model).name)))


def read_tokenizer(tokenizer: str | None, engine: EngineConfig) -> Tokenizer:
    from ..checkpoint import resolve_directory
    from ..text import Tokenizer

    source = tokenizer or engine.model
    revision = engine.revision if source == engine.model else None
    return Tokenizer.from_directory(resolve_directory(source, revision=revision, weights=False))


def _rerank_task(path: str | None) -> RankConfig:
    if path is None:
        return RankConfig(candidates_column="documents", text_column="query")
    config = load_task_file(path)
    if not isinstance(config, RankConfig) or config.candidates_column is None:
        raise TaskError(f"{path}: the server's rerank task is of kind rank and has a candidates_column")
    return config


def _classify_task(path: str | None) -> ClassifyConfig | None:
    if path is None:
        return None
    config = load_task_file(path)
    if not isinstance(config, ClassifyConfig):
        raise TaskError(f"{path}: the server's classify task is of kind classify")
    return config


class Drained(uvicorn.Server):
    """Warms up while it listens already, and drains on the first signal."""

    def __init__(
        self, server: ServerConfig, service: Service, metrics: Metrics, keys: Keys | None, tracer: Tracer
    ) -> None:
        limits = HttpLimits(payload_bytes=int(server.payload_limit_mib * 2**20), body_timeout_s=server.body_timeout_s)
        app = make_app(service, metrics, keys, limits, tracer)
        self._runner: BatchRunner | None = None
        if server.data_dir is not None:
            self._runner = BatchRunner(Store(Path(server.data_dir)), service, keys.salts if keys is not None else {})
            add_batch_routes(app, self._runner, int(server.file_limit_mib * 2**20))
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                http="h11",  # bounds the size of headers
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=int(_LAST_REPLIES_S),
            )
        )
        self._server = server
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            for one in sockets or []:
                host, port = one.getsockname()[:2]
                _log.info("running on http://%s:%d", f"[{host}]" if ":" in host else host, port)
            self._tasks.append(self._loop.create_task(self._warm_up()))
            if self._runner is not None:
                self._tasks.append(self._loop.create_task(self._runner.run()))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        loop = self._loop
        loop.call_soon_threadsafe(lambda: self._tasks.append(loop.create_task(self._drain())))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._service.close)
        if self._runner is not None:
            self._runner.store.close()

    async def _warm_up(self) -> None:
        scheduler = self._service.scheduler
        begin_s = time.monotonic()
        try:
            await asyncio.to_thread(warm_up, scheduler.engine, scheduler.paces.values(), self._server.warmup)
            await asyncio.to_thread(keep_heap)
        except Exception as error:
            _log.error("the warm-up failed: %s", error)
            self.should_exit = True
            return
        scheduler.start()
        _log.info("ready after %.1f s of warm-up", time.monotonic() - begin_s)

    async def _drain(self) -> None:
        seconds = self._server.drain_seconds
        _log.info("draining for at most %.0f s", seconds)
        left = await asyncio.to_thread(self._service.drain, seconds)
        _log.info("drained; %d requests were not served", left)
        for _ in range(int(_LAST_REPLIES_S / 0.05)):
            if not len(self._service.permits):
                break
            await asyncio.sleep(0.05)
        self.should_exit = True
