"""What a worker process runs: ``python -m moe_prefill.workers.process SOCKET RANK PAGE_FD STORE_FD``.

It says hello, is told what to build, and computes one sweep after another. It ends with its controller, however that
ends: by the closed socket, and where it cannot read that (stopped, or inside a driver's call) by the parent-death
signal. Until the engine is built nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ..blocks import BlockEvents, HashedSweep
from ..core import NOT_KEPT, AtomicRequest, RankFacts
from ..errors import MoePrefillError
from ..messages import (
    VERSION,
    Audit,
    Decoder,
    EnginePlan,
    Failure,
    Hello,
    Message,
    PackedEvents,
    PackedResults,
    PoolState,
    Ready,
    Score,
    Scored,
    Shutdown,
    Start,
    encode,
)
from ..residency.speed import PRECISIONS
from .page import ProgressPage

if TYPE_CHECKING:
    from ..engine import LocalEngine

_PR_SET_PDEATHSIG = 1
_CHUNK = 1 << 20
_WARM_UP_TOKENS = 48
_kept: list[object] = []  # for the life of the process: rank 0's store serves its peers while they are being built


class Controller:
    """The other end of the socket: messages from it wait in ``inbox``."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        threading.Thread(target=self._read, name="controller", daemon=True).start()

    def send(self, message: Message) -> None:
        for part in encode(message):
            self._socket.sendall(part)

    def _read(self) -> None:
        decoder = Decoder()
        try:
            while data := self._socket.recv(_CHUNK):
                for message in decoder.feed(data):
                    self.inbox.put(message)
        finally:
            os._exit(1)  # the controller is gone, and so is everybody whom this worker could serve


def build_rank(start: Start, rank: int, page_fd: int, store_fd: int) -> LocalEngine:
    """This rank's engine, which counts its layers in the shared page."""
    from ..dist import open_process_group, open_store
    from ..engine import build_engine
    from ..engine.build import rank_device
    from ..experts import Ranks
    from ..strategies import RankGroup, build_strategy_engine

    store = open_store(start.store_port, start.size, listen_fd=store_fd if rank == 0 else None)
    _kept.append(store)
    ranks, layers_done = Ranks(rank, start.size, store), ProgressPage(page_fd, start.size).counts[rank : rank + 1]
    if start.config.strategy == "asyncep":
        return build_engine(start.config, ranks, layers_done)
    device = rank_device(start.config.device, ranks)
    open_process_group(store, rank, start.size, device)
    return build_strategy_engine(start.config, RankGroup.of_world(device), layers_done)


def main(build: Callable[[Start, int, int, int], LocalEngine]) -> int:
    """Say hello, build, serve; returns the exit code."""
    path, rank, page_fd, store_fd = sys.argv[1], *map(int, sys.argv[2:])
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be noticed
        return 1
    controller = Controller(path)
    controller.send(Hello(version=VERSION, rank=rank, pid=os.getpid()))
    start = controller.inbox.get()
    assert isinstance(start, Start), start
    try:
        engine = build(start, rank, page_fd, store_fd)
        plan = EnginePlan(
            limits=engine.limits,
            forming=engine.forming,
            schedule=engine.schedule,
            plan_digest=engine.plan_digest,
            peak_flops=engine.peak_flops,
            facts=rank_facts(engine),
        )
        controller.send(Ready(plan=plan, layer_s=warm_up(engine)))
        serve(engine, controller, start.generation)
        engine.close()
    except MoePrefillError as error:
        controller.send(Failure(code=type(error).__name__, message=str(error)))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        controller.send(Failure(code=type(error).__name__, message=str(error)))
        return 1
    return 0


def warm_up(engine: LocalEngine) -> float:
    """Two small sweeps: in the first, what is compiled or opened at first use. From the second, how long a layer of a
    full sweep may take, in seconds: on a CPU in proportion to its tokens, while a GPU needs many to be busy at all.
    """
    tokens = np.zeros(min(_WARM_UP_TOKENS, engine.limits.max_request_tokens), np.int32)
    asked = [
        AtomicRequest.candidates(tokens, [0], vocabulary=vocabulary, salt=NOT_KEPT) for vocabulary in (False, True)
    ]
    for _ in range(2):
        start = time.perf_counter()
        for _ in engine.compute([asked]):
            pass
        layer_s = (time.perf_counter() - start) / engine.num_layers
    return layer_s * engine.limits.max_sweep_tokens / len(tokens) if engine.device_kind == "cpu" else layer_s


def rank_facts(engine: LocalEngine) -> RankFacts | None:
    """What routing needs to know; None: this rank has no residency plan of its own."""
    plan = engine.residency
    if plan is None:
        return None
    device = engine.device_kind
    if device == "cuda":
        import torch

        device = torch.cuda.get_device_name()
    return RankFacts(
        spec=engine.spec,
        device=device,
        precision=PRECISIONS[plan.bank_dtype],
        levels=plan.levels,
        bank_bytes=plan.bank_bytes,
        bank_buffers=plan.bank_buffers,
        kv_blocks=engine.kv_blocks,
    )


def serve(engine: LocalEngine, controller: Controller, generation: int) -> None:
    """Compute sweeps until the controller has no more."""
    given: deque[int] = deque()

    def audit() -> None:
        state = _packed(engine.snapshot(), generation)
        assert state is not None, "only pools are audited"
        controller.send(PoolState(events=state))

    before = replace(engine.stats)
    for results in engine.compute(arriving(controller.inbox, given, audit)):
        controller.send(
            Scored(
                number=given.popleft(),
                results=PackedResults.pack(results),
                stats=engine.stats - before,
                events=_packed(engine.take_events(), generation),
            )
        )
        before = replace(engine.stats)


def arriving(
    inbox: SimpleQueue[Message], given: deque[int], audit: Callable[[], None]
) -> Iterator[Sequence[AtomicRequest] | None]:
    """Sweeps as they come, their numbers in ``given``; None while one is computed and no other has come. ``audit`` is
    called where the controller asks what the pool holds.
    """
    while True:
        try:
            message = inbox.get(block=not given)
        except Empty:
            yield None
            continue
        if isinstance(message, Shutdown):
            return
        if isinstance(message, Audit):
            audit()
            continue
        assert isinstance(message, Score), message
        given.append(message.number)
        requests = message.requests.unpack()
        yield requests if message.chains is None else HashedSweep(requests, *message.chains.unpack())


def _packed(events: BlockEvents | None, generation: int) -> PackedEvents | None:
    return None if events is None else PackedEvents.pack(replace(events, generation=generation))


def run(build: Callable[[Start, int, int, int], LocalEngine] = build_rank) -> NoReturn:
    """``main``, and the end of the process. The engine has been closed: what libraries do at exit (a second of it in
    torch, and NCCL may wait for ranks that are gone) is not waited for.
    """
    code = main(build)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
