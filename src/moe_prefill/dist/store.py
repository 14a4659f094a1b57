"""The ranks' common key-value store."""

from __future__ import annotations

from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

_HOST = "127.0.0.1"
_TIMEOUT = timedelta(minutes=30)  # ranks load weights at different speeds; a lost rank ends the others long before


def open_store(port: int, num_ranks: int, *, listen_fd: int | None = None) -> TCPStore:
    """Connect to the store at ``port`` of the loopback. The rank that is given ``listen_fd``, a socket that listens
    there, serves it; no other program can have taken the port in between.
    """
    if listen_fd is None:
        return TCPStore(_HOST, port, num_ranks, False, timeout=_TIMEOUT, wait_for_workers=False)
    return TCPStore(_HOST, port, num_ranks, True, timeout=_TIMEOUT, wait_for_workers=False, master_listen_fd=listen_fd)
