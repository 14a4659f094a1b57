"""Files that exist completely or not at all, and what the operating system refuses in words."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import OutputError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_durably(path: Path, write: Callable[[IO[bytes]], object], temporary: Path | None = None) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it, and flush the directory.

    After a crash ``path`` is either as before or complete. ``temporary`` must be on the same file system; default: a
    hidden neighbour. Raises OutputError when the disk refuses; the temporary file is then removed.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    with refusals_named(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory, so that its renames survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses about writing ``path`` into OutputError with numbers and remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            free = shutil.disk_usage(path.parent).free
            raise OutputError(
                f"{path}: no space left to write ({os.strerror(error.errno or 0)}; {free:,} bytes free in "
                f"{path.parent}). "
                "What is finished is kept: free some space and run the same command with --resume"
            ) from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_space(directory: Path, needed: int) -> None:
    """Raise OutputError when ``needed`` bytes, a low estimate, are more than the disk has."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OutputError(
            f"{directory}: about {needed:,} bytes are needed for the output and its parts, {free:,} are free; "
            "write elsewhere, "
            "free some space, or split the job with --shard"
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """An exclusive lock on a file that the kernel releases when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock, or raise OutputError when another process holds it."""
        self._path = path
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._descriptor)
                raise OutputError(
                    f"{path.parent}: another process is writing this output now; wait for it or stop it"
                ) from error
            if self._is_current():
                return
            os.close(self._descriptor)  # the holder before us finished and removed it meanwhile

    def _is_current(self) -> bool:
        try:
            return os.fstat(self._descriptor).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        os.close(self._descriptor)
