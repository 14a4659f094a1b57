"""Groups of real processes: one function called in each rank, their results collected.

A server process that has imported everything forks the ranks, so that a group starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from moe_prefill.experts import Ranks

LOST = "lost"  # the result of a rank that ended without one
_LIMIT_S = 120.0


def run_group(
    work: Callable[..., Any],
    size: int,
    directory: Path,
    *arguments: Any,
    timeout_s: float = 60.0,
    start: str = "forkserver",
) -> list[Any]:
    """``work(ranks, *arguments)`` of every rank; ``timeout_s`` is the ranks' own. A rank's exception is raised here.
    ``start``: ``spawn`` for ranks that use CUDA.
    """
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(["tests.experts.rank_work"])
    path = directory / f"store-{work.__name__}-{size}-{time.monotonic_ns()}"
    ranks = []
    for rank in range(size):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_rank, args=(theirs, work, rank, size, str(path), timeout_s, arguments), daemon=True
        )
        process.start()
        theirs.close()
        ranks.append((mine, process))
    try:
        return [_result(pipe) for pipe, _ in ranks]
    finally:
        for _, process in ranks:
            process.kill()
            process.join()


def die() -> None:
    """End this rank as a kill would: no clean-up of any kind."""
    os._exit(9)


def _rank(pipe: Connection, work: Callable[..., Any], rank: int, size: int, path: str, timeout_s: float, arguments):
    torch.set_num_threads(1)
    try:
        pipe.send((True, work(Ranks(rank, size, FileStore(path, size), timeout_s), *arguments)))
        pipe.recv()  # stay until the parent has heard from all: others may still read this rank's memory
    except EOFError:
        pass
    except BaseException:
        pipe.send((False, f"rank {rank} of {size}:\n{traceback.format_exc()}"))


def _result(pipe: Connection) -> Any:
    assert pipe.poll(_LIMIT_S), f"no result in {_LIMIT_S} s"
    try:
        is_good, result = pipe.recv()
    except EOFError:
        return LOST
    assert is_good, result
    return result
