"""What every engine of several processes has in common: their lives, their restarts, and the thread that owns them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from queue import SimpleQueue

from ..config import EngineConfig
from ..core import EngineLimits, RunStats
from ..errors import MoePrefillError, WorkerError
from ..messages import EnginePlan, Message, Ready, Score, Scored
from .group import Closed, WorkerGroup, WorkerLost
from .watch import Patience, Watch

_log = logging.getLogger(__name__)


class ProcessEngine(ABC):
    """``config.gpus`` processes, and one thread that owns them: it hands sweeps out, takes results in and watches.

    When a worker is lost all are ended and started anew, and what was unfinished is given out again; after
    ``patience.restarts`` losses in a row without a finished sweep every caller gets a WorkerError. Errors that the
    workers find at their first start (UsageError, ModelError, PlanError) are raised here.

    A subclass says which rank computes what next. Its methods are called by the owning thread, those marked so with
    ``_lock`` held; its fields must be there before ``__init__`` of this class runs.
    """

    def __init__(self, config: EngineConfig, patience: Patience) -> None:
        assert config.gpus is not None
        self.size = config.gpus
        threads = config.threads or max(1, len(os.sched_getaffinity(0)) // self.size)
        self._config = replace(config, threads=threads)
        self._patience = patience
        self._lock = threading.Lock()  # of what callers and the owning thread share
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

    def close(self) -> None:
        """End the workers and wait until they are gone."""
        self._closing = True
        self._wake_up()
        self._thread.join()
        self._wake.close()
        self._waker.close()

    @property
    @abstractmethod
    def _idle(self) -> bool:
        """Whether nothing is unfinished. With the lock."""

    @abstractmethod
    def _busy(self) -> list[bool]:
        """Which ranks have been given something. With the lock."""

    @abstractmethod
    def _planned(self, plan: EnginePlan) -> None:
        """The workers are ready for the first time. What this raises ends the engine."""

    @abstractmethod
    def _joined(self, generation: int, group: WorkerGroup) -> None:
        """Every rank of life ``generation`` is ready."""

    @abstractmethod
    def _give(self) -> Iterable[tuple[int, Score]]:
        """What ranks are to compute now. With the lock."""

    @abstractmethod
    def _done(self, rank: int, scored: Scored) -> Callable[[], None] | None:
        """Take in a rank's results. With the lock; what tells those who wait is returned and called without it, when
        the work is counted. None: the results do not count.
        """

    @abstractmethod
    def _take_back(self) -> int:
        """The group is lost: let everything unfinished wait again; returns how many sweeps. With the lock."""

    @abstractmethod
    def _refuse(self, error: Exception) -> None:
        """Tell everyone who waits. Whoever comes from now on finds ``_error``."""

    def _attend(self, group: WorkerGroup, rank: int, message: Message) -> None:
        """Any other message of a rank."""
        raise WorkerLost(WorkerError(f"worker {rank} says {message!r:.200} where results belong"))

    def _wait_s(self) -> float | None:
        """How long there is nothing to decide unless something comes; None: for ever."""
        return None

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # so many calls are unheard that one more says nothing, or it is closed
            self._waker.send(b"!")

    def _run(self) -> None:
        try:
            self._live()
        except Exception as error:  # whatever it is, callers must not wait for ever
            with self._lock:
                self._error = error
            self._refuse(error)
            self._first.put(error)

    def _live(self) -> None:
        """Lives of the group, one after another. Raises what ends the last one, unless that is ``close``."""
        generation, losses, finished = 0, 0, -1
        lost_s: float | None = None  # when the group was lost that is being brought back
        while True:
            group = WorkerGroup(self._config, self.size, self._patience, self._wake, lambda: self._closing)
            try:
                layer_s = self._opened(group.start(generation), lost_s)
                self._joined(generation, group)
                lost_s = None
                self._serve(group, layer_s)
            except Closed:
                if self._plan is not None and self._idle:
                    group.finish()
                return
            except WorkerLost as loss:
                lost_s = lost_s or time.monotonic()
                losses = losses + 1 if finished == self._stats.sweeps else 1
                finished = self._stats.sweeps
                if (loss.reported and self._plan is None) or losses > self._patience.restarts:
                    raise _last_error(loss, losses) from None
                with self._lock:
                    again = self._take_back()
                _log.warning("%s; starting the workers again, %d sweeps are given out again", str(loss), again)
                generation += 1
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
                self._config = replace(self._config, chunk_rows=plan.limits.chunk_rows, kv_gib=plan.limits.kv_gib)
            self._planned(plan)
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
                given = list(self._give())
                self._count_busy_time()
            for rank, score in given:
                group.send(rank, score)
            for rank, message in group.poll(self._wait_s()):
                if isinstance(message, Scored):
                    self._take(rank, message)
                else:
                    self._attend(group, rank, message)
            if hanging := watch.hanging(self._busy()):
                raise group.hangs(hanging, watch.limit_s)

    def _take(self, rank: int, message: Scored) -> None:
        with self._lock:
            self._count_busy_time()
            tell = self._done(rank, message)
            if tell is not None:
                exposed_s = message.stats.exposed_s / self.size
                self._stats += replace(message.stats, busy_s=0.0, exposed_s=exposed_s)
        if tell is not None:
            tell()

    def _count_busy_time(self) -> None:
        """Add the time since the last call if there was work; the lock is held."""
        now = time.monotonic()
        if not self._idle:
            self._stats += RunStats(busy_s=now - self._busy_since)
        self._busy_since = now


def _last_error(loss: WorkerLost, losses: int) -> MoePrefillError:
    if losses == 1 or not isinstance(loss.error, WorkerError):
        return loss.error
    return WorkerError(
        f"the workers were lost {losses} times in a row without finishing a sweep, the last time because {loss}; "
        "finished windows of a job are kept, and --resume goes on"
    )
