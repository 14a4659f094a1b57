"""Look at this process's workers and do them harm."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moe_prefill.core import ScoringEngine


def children(pid: int | str = "self") -> list[int]:
    """Direct children of a process, whichever thread started them, in order of pid."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has just ended
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


def workers() -> list[int]:
    """The worker processes, real or fake; not what other tests leave running, such as a fork server."""
    return [
        pid for pid in children() if any(f"-m {where}.workers." in command(pid) for where in ("moe_prefill", "tests"))
    ]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(true: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.005)
    return False


def harm(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def harm_later(engine: ScoringEngine, rank: int, *, sweeps: int, number: int = signal.SIGKILL) -> None:
    """Return at once; a thread signals a worker as soon as the engine has computed more than ``sweeps`` sweeps."""

    def harm_one() -> None:
        assert wait_for(lambda: engine.stats.sweeps > sweeps, 60)
        harm(workers()[rank], number)

    threading.Thread(target=harm_one).start()
