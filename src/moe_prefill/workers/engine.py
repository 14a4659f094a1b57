"""The engine of lists: ``core.ScoringEngine`` over several processes, whose results depend on the list alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

from ..config import EngineConfig
from ..core import AtomicRequest, AtomicResult, ScoringEngine
from ..errors import UsageError
from ..messages import EnginePlan, PackedRequests, PackedResults, Score, Scored
from .base import ProcessEngine
from .board import Board, Sweep
from .group import WorkerGroup
from .watch import Patience


def build_scoring(config: EngineConfig) -> ScoringEngine:
    """The engine that the settings ask for: in this process, or with ``gpus`` in as many worker processes."""
    if config.gpus is not None:
        return GroupEngine(config)
    if config.strategy != "asyncep":
        raise UsageError(f"--strategy {config.strategy} splits the model over several GPUs; give --gpus N")
    from ..engine import build_engine

    return build_engine(config)


class GroupEngine(ProcessEngine):
    """Implements ``core.ScoringEngine`` with ``config.gpus`` processes; may be called by several threads.

    The sweeps are formed here, as an engine alone would form them, and each is computed by whichever rank is free, so
    neither the number of ranks nor the loss of one changes a result. Lists are taken up in the order of their calls.
    """

    def __init__(self, config: EngineConfig, patience: Patience = Patience()) -> None:  # noqa: B008 (frozen)
        assert config.gpus is not None
        self._board = Board(config.gpus, "free")
        super().__init__(config, patience)

    def score(self, requests: Sequence[AtomicRequest]) -> list[AtomicResult | Exception]:
        """Answers in the order of the requests. Raises WorkerError when the workers cannot be brought back."""
        return self.start(requests)()

    def start(self, requests: Sequence[AtomicRequest]) -> Callable[[], list[AtomicResult | Exception]]:
        """``score`` in two steps: hand the sweeps in, and later call what comes back to wait for the answers."""
        forming = self.plan.forming
        answers: list[AtomicResult | Exception | None] = [forming.refusal(request) for request in requests]
        valid = [index for index, answer in enumerate(answers) if answer is None]
        inbox = SimpleQueue[tuple[list[int], PackedResults] | Exception]()
        num_sweeps = 0
        for members in forming.sweeps(requests, valid):
            self._submit(Sweep(members, PackedRequests.pack([requests[index] for index in members]), inbox))
            num_sweeps += 1
        return lambda: _collect(answers, inbox, num_sweeps)

    def _submit(self, sweep: Sweep) -> None:
        with self._lock:
            if self._error is not None:
                raise self._error
            self._count_busy_time()
            self._board.add(sweep)
        self._wake_up()

    @property
    def _idle(self) -> bool:
        return self._board.idle

    def _busy(self) -> list[bool]:
        return self._board.busy()

    def _planned(self, plan: EnginePlan) -> None:
        self._board = Board(self.size, plan.schedule)

    def _joined(self, generation: int, group: WorkerGroup) -> None:
        pass

    def _give(self) -> Iterator[tuple[int, Score]]:
        for given in self._board.give():
            requests = given.sweep.requests if given.sweep is not None else PackedRequests.pack([])
            yield given.rank, Score(number=given.number, requests=requests)

    def _done(self, rank: int, scored: Scored) -> Callable[[], None] | None:
        sweep = self._board.done(rank, scored.number)
        if sweep is None:
            return None
        inbox, members = sweep.inbox, sweep.members
        return lambda: inbox.put((members, scored.results))

    def _take_back(self) -> int:
        return self._board.take_back()

    def _refuse(self, error: Exception) -> None:
        with self._lock:
            sweeps = self._board.drain()
        for inbox in {id(sweep.inbox): sweep.inbox for sweep in sweeps}.values():
            inbox.put(error)


def _collect(
    answers: list[AtomicResult | Exception | None],
    inbox: SimpleQueue[tuple[list[int], PackedResults] | Exception],
    num_sweeps: int,
) -> list[AtomicResult | Exception]:
    """Wait for the results of all sweeps and put them in their places."""
    for _ in range(num_sweeps):
        arrived = inbox.get()
        if isinstance(arrived, Exception):
            raise arrived
        members, results = arrived
        for index, result in zip(members, results.unpack(), strict=True):
            assert answers[index] is None, f"request {index} was answered twice"
            answers[index] = result
    done = [answer for answer in answers if answer is not None]
    assert len(done) == len(answers), "every request gets exactly one answer"
    return done
