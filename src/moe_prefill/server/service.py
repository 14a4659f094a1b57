"""One request from its bytes to its reply: a permit, its plan in a thread, the scheduler, the reply in a thread."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from ..core import AtomicRequest
from .backends import Answers
from .context import Context, Plan, Results
from .endpoints import Dialect, Endpoint
from .fairqueue import Work, make_work
from .keys import ANYONE, Caller
from .refusals import Refused, bad_request, overloaded, refusal_of
from .scheduler import Lane, Scheduler

_log = logging.getLogger(__name__)

_FORM = re.compile(r"(str|bool|int)|(list|dict)\[.*\]")  # how pydantic names one of several forms of a field
_SMALL_REPLY = 64  # numbers
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_TEI_TYPES = {413: "Validation", 429: "Overloaded", 503: "Unhealthy", 424: "Backend", 500: "Backend"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds of one request: in its plan and reply, in the queue, in the engine, and altogether."""

    total_s: float = 0.0
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the client gets. ``code``: the word of its error, "" where it has none."""

    status: int
    body: bytes
    code: str = ""
    retry_after_s: int | None = None
    prompt_tokens: int = 0
    timings: Timings = Timings()


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A planned request: its work (None: nothing to compute) and where in it each of its requests went."""

    plan: Plan
    work: Work | None
    places: Sequence[int]
    seconds: float

    @property
    def num_values(self) -> int:
        """Numbers in the results, at most."""
        return sum(len(request.ids) + len(request.positions) * (1 + request.top_k) for request in self.plan.requests)

    def reply(self, answers: Results) -> bytes:
        return to_json(self.plan.finish([answers[place] for place in self.places]), inf_nan_mode="null")


class Permits:
    """How many requests may be inside at once, waiting or not, all together and of one tenant. Of the event loop."""

    def __init__(self, limit: int, tenant_share: float) -> None:
        self._limit = limit
        self._tenant_limit = max(1, int(limit * tenant_share))
        self._inside: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._inside.total()

    @contextmanager
    def one(self, tenant: str, retry_after_s: Callable[[], int]) -> Iterator[None]:
        """Hold a permit. Raises 429 when there is none left."""
        total = self._inside.total()
        if total >= self._limit:
            raise overloaded(
                f"{total} requests are being served, the limit is {self._limit}; try again after the time in "
                "Retry-After",
                retry_after_s(),
            )
        if self._inside[tenant] >= self._tenant_limit:
            raise overloaded(
                f"{self._tenant_limit} of your requests are being served, which is your share; try again after the "
                "time in Retry-After",
                retry_after_s(),
            )
        self._inside[tenant] += 1
        try:
            yield
        finally:
            self._inside[tenant] -= 1
            if not self._inside[tenant]:
                del self._inside[tenant]


class Service:
    """Answers requests with the context's endpoints and the scheduler's engine. ``answer`` never raises."""

    def __init__(self, context: Context, scheduler: Scheduler, *, threads: int = 2) -> None:
        self.context = context
        self.scheduler = scheduler
        policy = scheduler.policy
        self.permits = Permits(policy.max_queue_requests, policy.tenant_share)
        self._pools: dict[Lane, ThreadPoolExecutor] = {  # nobody interactive queues behind the lines of a batch
            "interactive": ThreadPoolExecutor(threads, thread_name_prefix="tokenize"),
            "batch": ThreadPoolExecutor(1, thread_name_prefix="batch"),
        }

    def close(self) -> None:
        self.scheduler.close()
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def drain(self, seconds: float) -> int:
        """Refuse new requests, answer those that are inside; blocks. Returns how many got a 503 in the end."""
        return self.scheduler.drain(seconds, coming=lambda: len(self.permits))

    async def answer(
        self,
        endpoint: Endpoint,
        body: bytes,
        *,
        caller: Caller = ANYONE,
        lane: Lane = "interactive",
        request_id: str = "",
    ) -> Answer:
        """Serve one body. Cancelling the call takes what is not yet computed out of the queue."""
        begin_s = time.monotonic()
        dialect = endpoint.forms[-1].dialect
        try:
            self.scheduler.check_open()
            if lane == "batch":
                return await self._serve(endpoint, body, caller, lane, begin_s)
            with self.permits.one(caller.tenant, self.scheduler.retry_after_s):
                return await self._serve(endpoint, body, caller, lane, begin_s)
        except Exception as error:
            if len({form.dialect for form in endpoint.forms}) > 1:
                dialect = _dialect(endpoint, body)
            return replace(failed(error, request_id, dialect), timings=Timings(total_s=time.monotonic() - begin_s))

    async def _serve(self, endpoint: Endpoint, body: bytes, caller: Caller, lane: Lane, begin_s: float) -> Answer:
        loop, pool = asyncio.get_running_loop(), self._pools[lane]
        ready = await loop.run_in_executor(pool, _plan, endpoint, self.context, body, caller)
        answers: Answers = []
        queue_s = inference_s = 0.0
        if ready.work is not None:
            self.scheduler.submit(ready.work, lane)
            answers = await asyncio.wrap_future(ready.work.reply)
            done_s = time.monotonic()
            queue_s = (ready.work.started_s or done_s) - ready.work.arrived_s
            inference_s = done_s - (ready.work.started_s or done_s)
        reply_s = time.monotonic()
        if ready.num_values <= _SMALL_REPLY:  # a change of threads would take longer
            told = ready.reply(answers)
        else:
            told = await loop.run_in_executor(pool, ready.reply, answers)
        now_s = time.monotonic()
        return Answer(
            status=200,
            body=told,
            prompt_tokens=ready.plan.prompt_tokens,
            timings=Timings(
                total_s=now_s - begin_s,
                tokenize_s=ready.seconds + now_s - reply_s,
                queue_s=queue_s,
                inference_s=inference_s,
            ),
        )


def plan_body(endpoint: Endpoint, context: Context, body: bytes) -> tuple[Plan, str]:
    """The plan of a body and the salt that it asks for. Raises Refused and its like."""
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request("bad_json", f"the body is not valid JSON: {error}") from None
    plan = endpoint.plan(context, raw)
    salt = raw.get("cache_salt")
    return plan, salt if isinstance(salt, str) else ""


def salted(requests: Sequence[AtomicRequest], tenant_salt: str, own_salt: str) -> list[AtomicRequest]:
    """Requests that share computed prefixes with nobody of another tenant or salt."""
    if not (tenant_salt or own_salt):
        return list(requests)
    salt = f"{tenant_salt}\0{own_salt}"
    return [replace(request, salt=salt) for request in requests]


def told(error: Exception) -> Refused:
    """As ``refusal_of``, and the first of what pydantic found. Its message never holds the value that was sent."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, itertools.takewhile(lambda part: not _FORM.fullmatch(str(part)), first["loc"])))
        return bad_request("bad_field", f"{where}: {first['msg']}" if where else first["msg"], where or None)
    return refusal_of(error)


def failed(error: Exception, request_id: str, dialect: Dialect = "openai") -> Answer:
    """An error as an answer; one that nobody foresaw is logged."""
    refused = told(error)
    if refused.status >= 500 and not isinstance(error, Refused):
        _log_bug(error, request_id)
    return refusal(refused, dialect)


def refusal(refused: Refused, dialect: Dialect = "openai") -> Answer:
    """An error in the form that the endpoint's clients read."""
    status, message = refused.status, str(refused)
    body: dict[str, object]
    if dialect == "tei":
        empty = refused.code in ("empty", "empty_text")
        status = 422 if status in (400, 413) and not empty else status
        kind = "Empty" if empty else _TEI_TYPES.get(refused.status, "Validation")
        body = {"error": message, "error_type": kind}
    else:
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        body = {"error": {"message": message, "type": kind, "param": refused.param, "code": refused.code}}
    return Answer(status=status, body=to_json(body), code=refused.code, retry_after_s=refused.retry_after_s)


def _plan(endpoint: Endpoint, context: Context, body: bytes, caller: Caller) -> _Ready:
    begin_s = time.monotonic()
    plan, salt = plan_body(endpoint, context, body)
    if not plan.requests:
        return _Ready(plan, None, [], time.monotonic() - begin_s)
    work, places = make_work(salted(plan.requests, caller.salt, salt), caller.tenant)
    return _Ready(plan, work, places, time.monotonic() - begin_s)


def _dialect(endpoint: Endpoint, body: bytes) -> Dialect:
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError:
        return endpoint.forms[-1].dialect
    return endpoint.form_of(raw).dialect if isinstance(raw, dict) else endpoint.forms[-1].dialect


def _log_bug(error: Exception, request_id: str) -> None:
    """Where it happened; not the message, which may hold what was sent."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("request %s met a bug: %s\n%s", request_id, type(error).__name__, frames)
