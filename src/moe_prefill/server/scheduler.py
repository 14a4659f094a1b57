"""Between HTTP and the engine: bounded queues, and the threads that form the engine's calls, as many as it takes at
once.

A call takes what is queued, as late as possible: the oldest first, interactive work before batches. When little is
there it waits a moment for more. It carries at most as many tokens as the engine, by its speed so far, computes in
``max_sweep_s``, so that who comes next does not wait longer than that. Calls of batches are smaller, and much smaller
while interactive requests come.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..core import ScoringEngine
from ..errors import MoePrefillError, WorkerError
from .backends import Answers, backend_of
from .fairqueue import FairQueue, Part, Work
from .pace import Pace
from .refusals import Refused, overloaded, unavailable

_log = logging.getLogger(__name__)
_QUIET_S = 5.0  # since the last interactive request: nobody is likely to come during the next call

Lane = Literal["interactive", "batch"]
Size = Literal["interactive", "batch", "beside"]  # of calls; beside: of batches, while interactive requests come
State = Literal["starting", "ready", "draining", "drained", "failed", "closed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Bounds of queues and calls. Seconds and tokens; ``tenant_share`` of the queue is what one tenant may fill."""

    max_queue_tokens: int
    max_queue_requests: int = 512
    max_wait_s: float = 0.002
    max_sweep_s: float = 1.0
    batch_sweep_s: float = 0.25
    interactive_wait_s: float = 0.05  # for a batch's call, while interactive requests come
    tenant_share: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What the engine computes next: parts of works of one lane."""

    parts: Sequence[Part]
    lane: Lane

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def num_requests(self) -> int:
        return sum(part.end - part.start for part in self.parts)


class Scheduler:
    """Owns the engine. ``submit`` takes work in or refuses it; every work taken in gets exactly one reply.

    ``observe`` is called with every finished call and its seconds. The threads are started with ``start``; tests call
    ``decide`` and ``run`` themselves.
    """

    def __init__(
        self,
        engine: ScoringEngine,
        policy: Policy,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self._backend = backend_of(engine)
        calls = self._backend.calls_at_once  # together they take as long as one may
        self.paces: dict[Size, Pace] = {
            "interactive": Pace(policy.max_sweep_s / calls),
            "batch": Pace(policy.batch_sweep_s / calls),
            "beside": Pace(min(policy.batch_sweep_s, policy.interactive_wait_s) / calls),
        }
        self.state: State = "starting"
        self.observe: Callable[[Call, float], None] = lambda call, seconds: None
        self._clock = clock
        self._changed = threading.Condition()  # guards the queues and the state
        self._queues: dict[Lane, FairQueue] = {"interactive": FairQueue(), "batch": FairQueue()}
        self._running: list[Call] = []
        self._learnt_s = -math.inf  # when the last call ended
        self._asked_s = -math.inf  # when the last interactive request came
        self._threads = [
            threading.Thread(target=self._live, name=f"scheduler-{number}", daemon=True) for number in range(calls)
        ]

    def start(self) -> None:
        """Begin to serve, unless the server is being ended already."""
        with self._changed:
            if self.state != "starting":
                return
            self.state = "ready"
        for thread in self._threads:
            thread.start()

    @property
    def _closed(self) -> bool:
        return self.state == "closed"

    def check_open(self) -> None:
        """Raise 503 unless new requests are taken in."""
        if self.state == "starting":
            raise unavailable("starting", "the server is warming up; ask /ready", 5)
        if self.state in ("draining", "drained", "closed"):
            raise unavailable("draining", "the server is shutting down; send the request to another one", 5)
        if self.state == "failed":
            raise unavailable("engine_lost", "the engine is not available; the server's log says why", 30)

    def queued(self, lane: Lane) -> tuple[int, int]:
        """Works and tokens that wait."""
        with self._changed:
            queue = self._queues[lane]
            return len(queue), queue.tokens

    @property
    def running_tokens(self) -> int:
        """Of the calls that the engine has been given."""
        with self._changed:
            return sum(call.tokens for call in self._running)

    def retry_after_s(self) -> int:
        """When the present queue will be done, whole seconds from 1 to 60."""
        tokens = sum(queue.tokens for queue in self._queues.values())
        return min(60, max(1, math.ceil(self.pace.seconds(tokens))))

    @property
    def pace(self) -> Pace:
        """That of interactive calls."""
        return self.paces["interactive"]

    def submit(self, work: Work, lane: Lane = "interactive") -> None:
        """Take work in. Raises Refused: 429 when the queue is full, 503 when the server drains or the engine is lost.

        Batches are bounded by who sends them, so the limits are those of the interactive lane.
        """
        with self._changed:
            if self.state != "draining" or lane == "batch":
                self.check_open()
            if lane == "interactive":
                self._check_room(work)
            work.arrived_s = self._clock()
            if lane == "interactive":
                self._asked_s = work.arrived_s
            self._queues[lane].push(work)
            self._changed.notify_all()

    def decide(self) -> Call | float | None:
        """The next call; or seconds to wait for more work; or None when there is no work."""
        with self._changed:
            for lane in ("interactive", "batch"):
                queue = self._queues[lane]
                if not queue:
                    continue
                budget = self._budget(lane)
                waited_s = self._clock() - queue.oldest_s
                if lane == "interactive" and queue.tokens < budget and waited_s < self.policy.max_wait_s:
                    return self.policy.max_wait_s - waited_s
                parts = queue.take(budget)
                if parts:
                    call = Call(parts, lane)
                    self._running.append(call)
                    return call
            return None

    def run(self, call: Call) -> None:
        """Compute one call and answer the works that it completes."""
        begin_s = self._clock()
        for part in call.parts:
            part.work.started_s = part.work.started_s or begin_s
        missing, computed = dict(enumerate(call.parts)), 0
        try:
            for number, answers in self._backend.compute(call.parts):
                part = missing.pop(number)
                computed += part.computed_tokens(answers)
                self._answer(part, answers)
            assert not missing, f"{len(missing)} parts of a call were not answered"
            self._learn(computed, begin_s)
        except Exception as error:  # whatever it is, nobody may wait for ever
            # Only our own messages are known to hold nothing of a prompt.
            why = error if isinstance(error, MoePrefillError) else type(error).__name__
            _log.error("a call of %d requests failed: %s", call.num_requests, why, exc_info=True)
            if isinstance(error, WorkerError):
                self._fail()
            for part in missing.values():
                self._answer(part, [error] * len(part.requests))
        self.observe(call, self._clock() - begin_s)
        with self._changed:
            self._running.remove(call)
            self._changed.notify_all()

    def _answer(self, part: Part, answers: Answers) -> None:
        with self._changed:
            complete = part.fill(answers)
        if complete:
            part.work.resolve(part.work.answers)

    def _learn(self, tokens: int, begin_s: float) -> None:
        """How long the engine took for a call that computed so many tokens: not while it was at the call before."""
        with self._changed:
            now_s = self._clock()
            for pace in self.paces.values() if tokens else ():
                pace.add(tokens, now_s - max(begin_s, self._learnt_s))
            self._learnt_s = now_s

    def drain(self, seconds: float, coming: Callable[[], int] = lambda: 0) -> int:
        """Finish what is queued, and ``coming`` requests that are inside but not yet queued, for at most ``seconds``;
        answer the rest with a 503. New requests are refused at once (``check_open``).

        Batch work is given back at once: its lines are kept and go on after the next start. Returns how many works
        were not served.
        """
        end_s = time.monotonic() + seconds
        with self._changed:
            if self.state in ("draining", "drained", "closed"):
                return 0
            if self.state != "failed":
                self.state = "draining"
            left = self._queues["batch"].drain()
            self._changed.notify_all()
        self._refuse(left)
        with self._changed:
            while time.monotonic() < end_s and (self._queues["interactive"] or self._running or coming()):
                self._changed.wait(0.02)
            if self.state == "draining":
                self.state = "drained"
            left = self._queues["interactive"].drain()
        self._refuse(left)
        return len(left)

    def close(self) -> None:
        """End the threads after the calls that run. What is still queued gets a 503."""
        with self._changed:
            self.state = "closed"
            left = [work for queue in self._queues.values() for work in queue.drain()]
            self._changed.notify_all()
        self._refuse(left)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _live(self) -> None:
        while not self._closed:
            call = self.decide()
            if isinstance(call, Call):
                self.run(call)
                continue
            with self._changed:
                if not self._closed and (call is not None or not any(self._queues.values())):
                    self._changed.wait(call)

    def _budget(self, lane: Lane) -> float:
        """Tokens of one call. Before anything was measured, one sweep's."""
        tokens = self.paces["beside" if lane == "batch" and self._in_use else lane].call_tokens
        return float(self.engine.limits.max_sweep_tokens) if tokens is None else self._backend.fitting(tokens)

    @property
    def _in_use(self) -> bool:
        """Whether interactive requests come. With the lock."""
        running = any(call.lane == "interactive" for call in self._running)
        return running or self._clock() - self._asked_s < _QUIET_S

    def _check_room(self, work: Work) -> None:
        """Raise 413 and 429. What nobody waits for any more takes no room from others."""
        if self._refusal(work) is not None:
            self._queues["interactive"].drop_cancelled()
        refused = self._refusal(work)
        if refused is not None:
            raise refused

    def _refusal(self, work: Work) -> Refused | None:
        queue, policy = self._queues["interactive"], self.policy
        if work.tokens > policy.max_queue_tokens:
            return Refused(
                413,
                "request_too_large",
                f"the request has {work.tokens} tokens to compute and the whole queue holds {policy.max_queue_tokens}; "
                "send it in parts, or raise --max-queue-tokens",
            )
        if len(queue) >= policy.max_queue_requests or queue.tokens + work.tokens > policy.max_queue_tokens:
            return overloaded(
                f"the queue is full: {len(queue)} requests of {policy.max_queue_requests} and {queue.tokens} tokens of "
                f"{policy.max_queue_tokens} wait; try again after the time in Retry-After",
                self.retry_after_s(),
            )
        mine = queue.tenant_tokens.get(work.tenant, 0)
        if mine and mine + work.tokens > policy.tenant_share * policy.max_queue_tokens:
            return overloaded(
                f"your requests fill your share of the queue ({mine} tokens); try again after the time in Retry-After",
                self.retry_after_s(),
            )
        return None

    def _fail(self) -> None:
        """The engine is gone for good: tell everyone who waits."""
        with self._changed:
            if self.state != "closed":
                self.state = "failed"
            left = [work for queue in self._queues.values() for work in queue.drain()]
        self._refuse(left)

    def _refuse(self, works: Sequence[Work]) -> None:
        for work in works:
            work.resolve(
                unavailable("not_served", "the server stopped before it came to this request; send it again", 5)
            )
