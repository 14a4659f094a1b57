"""The engine of several processes: ``core.ScoringEngine`` over a group that is brought back when it is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from queue import SimpleQueue

from ..config import EngineConfig
from ..core import AtomicRequest, AtomicResult, EngineLimits, RunStats, ScoringEngine
from ..errors import MoePrefillError, UsageError, WorkerError
from ..messages import EnginePlan, Message, PackedRequests, PackedResults, Ready, Score, Scored
from .board import Board, Sweep
from .group import Closed, WorkerGroup, WorkerLost
from .watch import Patience, Watch

_log = logging.getLogger(__name__)


def build_scoring(config: EngineConfig) -> ScoringEngine:
    """The engine that the settings ask for: in this process, or with ``gpus`` in as many worker processes."""
    if config.gpus is not None:
        return GroupEngine(config)
    if config.strategy != "asyncep":
        raise UsageError(f"--strategy {config.strategy} splits the model over several GPUs; give --gpus N")
    from ..engine import build_engine

    return build_engine(config)


class GroupEngine:
    """Implements ``core.ScoringEngine`` with ``config.gpus`` processes; ``score`` may be called by several threads.

    The sweeps are formed here, as an engine alone would form them, and each is computed by whichever rank is free, so
    neither the number of ranks nor the loss of one changes a result. One thread owns the processes: it hands sweeps
    out, takes results in and watches. When a worker is lost all are ended and started anew, and what was unfinished is
    given out again; after ``patience.restarts`` losses in a row without a finished sweep, every caller gets a
    WorkerError. Errors that the workers find at their first start (UsageError, ModelError, PlanError) are raised here.
    """

    def __init__(self, config: EngineConfig, patience: Patience = Patience()) -> None:  # noqa: B008 (frozen)
        assert config.gpus is not None
        self.size = config.gpus
        threads = config.threads or max(1, len(os.sched_getaffinity(0)) // self.size)
        self._config = replace(config, threads=threads)
        self._patience = patience
        self._lock = threading.Lock()  # of the board, the counters and the error
        self._board = Board(self.size, "free")
        self._error: Exception | None = None
        self._closing = False
        self._stats = RunStats()
        self._busy_since = time.monotonic()
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._first = SimpleQueue[EnginePlan | Exception]()
        self._plan: EnginePlan | None = None  # of the first life, and so of all
        self._thread = threading.Thread(target=self._run, name="workers", daemon=True)
        self._thread.start()
        try:
            first = self._first.get()
        except BaseException:  # Ctrl-C while the weights load
            self.close()
            raise
        if isinstance(first, Exception):
            self.close()
            raise first

    @property
    def plan(self) -> EnginePlan:
        assert self._plan is not None
        return self._plan

    @property
    def limits(self) -> EngineLimits:
        return self.plan.limits

    @property
    def stats(self) -> RunStats:
        """Sums over the workers. Of times, ``busy_s`` is that in which any worker had work, and ``exposed_s`` the mean
        of their waiting.
        """
        return self._stats

    @property
    def plan_digest(self) -> str:
        return self.plan.plan_digest

    @property
    def peak_flops(self) -> float | None:
        """Of all workers together."""
        peak = self.plan.peak_flops
        return None if peak is None else peak * self.size

    def score(self, requests: Sequence[AtomicRequest]) -> list[AtomicResult | Exception]:
        """Answers in the order of the requests. Raises WorkerError when the workers cannot be brought back."""
        forming = self.plan.forming
        answers: list[AtomicResult | Exception | None] = [forming.refusal(request) for request in requests]
        valid = [index for index, answer in enumerate(answers) if answer is None]
        inbox = SimpleQueue[tuple[list[int], PackedResults] | Exception]()
        num_sweeps = 0
        for members in forming.sweeps(requests, valid):
            self._submit(Sweep(members, PackedRequests.pack([requests[index] for index in members]), inbox))
            num_sweeps += 1
        for _ in range(num_sweeps):
            arrived = inbox.get()
            if isinstance(arrived, Exception):
                raise arrived
            members, results = arrived
            for index, result in zip(members, results.unpack(), strict=True):
                assert answers[index] is None, f"request {index} was answered twice"
                answers[index] = result
        done = [answer for answer in answers if answer is not None]
        assert len(done) == len(requests), "every request gets exactly one answer"
        return done

    def close(self) -> None:
        """End the workers and wait until they are gone."""
        self._closing = True
        self._wake_up()
        self._thread.join()
        self._wake.close()
        self._waker.close()

    def _submit(self, sweep: Sweep) -> None:
        with self._lock:
            if self._error is not None:
                raise self._error
            self._count_busy_time()
            self._board.add(sweep)
        self._wake_up()

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # so many calls are unheard that one more says nothing
            self._waker.send(b"!")

    # Everything below runs in the thread that owns the processes.

    def _run(self) -> None:
        try:
            self._live()
        except Exception as error:  # whatever it is, callers must not wait for ever
            self._fail(error)

    def _live(self) -> None:
        """Lives of the group, one after another. Raises what ends the last one, unless that is ``close``."""
        losses, finished = 0, -1
        lost_s: float | None = None  # when the group was lost that is being brought back
        while True:
            group = WorkerGroup(self._config, self.size, self._patience, self._wake, lambda: self._closing)
            try:
                layer_s = self._opened(group.start(), lost_s)
                lost_s = None
                self._serve(group, layer_s)
            except Closed:
                if self._plan is not None and self._board.idle:
                    group.finish()
                return
            except WorkerLost as loss:
                lost_s = lost_s or time.monotonic()
                losses = losses + 1 if finished == self._stats.sweeps else 1
                finished = self._stats.sweeps
                if (loss.reported and self._plan is None) or losses > self._patience.restarts:
                    raise _last_error(loss, losses) from None
                with self._lock:
                    again = self._board.take_back()
                _log.warning("%s; starting the workers again, %d sweeps are given out again", str(loss), again)
            finally:
                group.kill()

    def _opened(self, ready: list[Ready], lost_s: float | None) -> float:
        """Every rank is ready: the first time their plan becomes the engine's, later it must be the same. Returns the
        predicted seconds of a layer.
        """
        plan = ready[0].plan
        if any(rank.plan != plan for rank in ready):
            raise WorkerError(
                f"the workers' plans differ ({', '.join(rank.plan.plan_digest for rank in ready)}): "
                "the GPUs of a group must be of one kind; choose them with CUDA_VISIBLE_DEVICES"
            )
        if self._plan is None:
            # Free memory may be another one after a restart.
            self._config = replace(self._config, max_sweep_tokens=plan.limits.max_sweep_tokens)
            if self._config.strategy == "asyncep":
                self._config = replace(self._config, chunk_rows=plan.limits.chunk_rows)
            self._board = Board(self.size, plan.schedule)
            self._plan = plan
            self._first.put(plan)
        elif plan != self._plan:
            raise WorkerError(f"the plan after a restart is {plan}, it was {self._plan}")
        else:
            assert lost_s is not None
            recovery_s = time.monotonic() - lost_s
            with self._lock:
                self._stats += RunStats(restarts=1, recovery_s=recovery_s)
            _log.warning("the workers are back after %.1f s", recovery_s)
        return max(rank.layer_s for rank in ready)

    def _serve(self, group: WorkerGroup, layer_s: float) -> None:
        """Give, take, watch, until the group is closed or lost."""
        watch = Watch(group.page.read, self._patience, layer_s)
        while True:
            with self._lock:
                given = list(self._board.give())
                self._count_busy_time()
            for item in given:
                requests = item.sweep.requests if item.sweep is not None else PackedRequests.pack([])
                group.send(item.rank, Score(number=item.number, requests=requests))
            for rank, message in group.poll():
                self._take(rank, message)
            if hanging := watch.hanging(self._board.busy()):
                raise group.hangs(hanging, watch.limit_s)

    def _take(self, rank: int, message: Message) -> None:
        if not isinstance(message, Scored):
            raise WorkerLost(WorkerError(f"worker {rank} says {message!r:.200} where results belong"))
        with self._lock:
            self._count_busy_time()
            sweep = self._board.done(rank, message.number)
            if sweep is not None:
                exposed_s = message.stats.exposed_s / self.size
                self._stats += replace(message.stats, busy_s=0.0, exposed_s=exposed_s)
        if sweep is not None:
            sweep.inbox.put((sweep.members, message.results))

    def _count_busy_time(self) -> None:
        """Add the time since the last call if there was work; the lock is held."""
        now = time.monotonic()
        if not self._board.idle:
            self._stats += RunStats(busy_s=now - self._busy_since)
        self._busy_since = now

    def _fail(self, error: Exception) -> None:
        """Tell everyone who waits, and whoever comes later."""
        with self._lock:
            self._error = error
            sweeps = self._board.drain()
        for inbox in {id(sweep.inbox): sweep.inbox for sweep in sweeps}.values():
            inbox.put(error)
        self._first.put(error)


def _last_error(loss: WorkerLost, losses: int) -> MoePrefillError:
    if losses == 1 or not isinstance(loss.error, WorkerError):
        return loss.error
    return WorkerError(
        f"the workers were lost {losses} times in a row without finishing a sweep, the last time because {loss}; "
        "finished windows of a job are kept, and --resume goes on"
    )
