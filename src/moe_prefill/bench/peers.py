"""Other engines on the same cells, each side in a process of its own, one after the other: the GPU's memory is free
when the next one starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..errors import UsageError, WorkerError
from .job import Job

PEERS = ("vllm", "transformers")
_ROOT = Path(__file__).resolve().parents[2]


def check_peer(name: str, site: str | None) -> None:
    """UsageError: the peer is not known, or not installed. ``site``: a folder of packages outside our environment."""
    if name not in PEERS:
        raise UsageError(f"peer {name!r} is not known; peers: {', '.join(PEERS)}")
    if importlib.util.find_spec(name) is None and not (site and (Path(site) / name).is_dir()):
        where = f", nor in {site}" if site else ""
        raise UsageError(
            f"{name} is not installed in {sys.prefix}{where}; install it, or give its folder with --peer-site"
        )


def run_side(side: str, job: Job, *, site: str | None = None) -> list[dict[str, Any]]:
    """Cells of ``ours`` or of a peer, computed in a process that has ended when this returns. WorkerError, with the
    side's last words on stderr, when it failed.
    """
    with TemporaryDirectory(prefix="moe-prefill-bench-") as folder:
        given, found = Path(folder) / "job.json", Path(folder) / "cells.json"
        job.save(given)
        paths = [*([site] if site else []), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", f"moe_prefill.bench.sides.{side}", str(given), str(found)]
        code = run_until_found(command, os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, found)
        if code or not found.exists():
            raise WorkerError(f"the process of {side} ended with code {code}; its messages are above")
        cells: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))
    return cells


def run_until_found(command: Sequence[str], env: Mapping[str, str], found: Path, grace_s: float = 30.0) -> int:
    """The exit code of a process, which is ended with all that it started once its file is there and it has had
    ``grace_s`` to end by itself: engines have been seen to hang in their own shutdown, behind all measurements.
    """
    with subprocess.Popen(command, env=env, start_new_session=True) as process:
        try:
            while True:
                is_found = found.exists()
                try:
                    return process.wait(grace_s)
                except subprocess.TimeoutExpired:
                    if is_found:
                        return 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def compared(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our cells with a peer's figures and the ratio of tokens/s beside them; both in the order of the job's cells.

    Where both give logits of the same requests, ``largest_relative_difference`` says how far they are apart.
    """
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    return [_compared(mine, peer) for mine, peer in zip(ours, theirs, strict=True)]


def _compared(mine: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    both = {**mine, **peer, "ratio": mine["tokens_per_s"] / peer["peer_tokens_per_s"]}
    left, right = both.pop("logits", []), both.pop("peer_logits", [])
    count = min(len(left), len(right))
    if count:
        here, there = np.asarray(left[:count]), np.asarray(right[:count])
        both["largest_relative_difference"] = float(np.abs(here - there).max() / np.abs(there).max())
    return both
