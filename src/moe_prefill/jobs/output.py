"""Where a job's rows go: a file that appears at once when all is done, or standard output."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from ..errors import OutputError, UsageError
from .counts import Counts
from .durable import Lock, check_space, file_digest, refusals_named, write_durably
from .manifest import FORMAT_VERSION, Identity, check_same_job, json_mapping, read_json
from .parts import LOCK, OUTPUT, Part, PartsDirectory
from .tables import TableWriter
from .windows import Window


def sidecar_path(output: Path) -> Path:
    """The record of a finished job, beside its output."""
    return output.with_name(output.name + ".job.json")


def check_place(path: Path) -> None:
    """Raise OutputError where no file can be written."""
    with refusals_named(sidecar_path(path)):
        sidecar_path(path).exists()  # a name that is too long is found now, not when all is computed
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; give a file name, for example {path / 'answers.csv'}")
    if (path.exists() and not path.is_file()) or path.is_relative_to("/proc"):
        raise OutputError(f"{path}: is not a regular file; give another -o, or - for standard output")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the directory {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot be written: no permission in {path.parent}")


class Output(Protocol):
    """What the runner needs of a destination."""

    @property
    def complete(self) -> bool:
        """An earlier run of the same job has finished the output (known after ``begin``): there is nothing to do."""
        ...

    def begin(self, identity: Identity, writer: TableWriter, needed_bytes: int) -> dict[int, Counts]:
        """Start or resume; returns the counts of windows that are finished already."""
        ...

    def write(self, window: Window, write: Callable[[IO[bytes]], object], counts: Counts) -> None: ...

    def finish(self, windows: Sequence[Window], num_rows: int, about: Mapping[str, object]) -> None: ...

    def close(self) -> None: ...


class FileOutput:
    """A file with its parts directory and its lock. Made before the model is loaded, so that refusals come early."""

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Claim ``path``. Raises OutputError when it exists, is being written, or cannot be written."""
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        self.path = Path(os.path.realpath(path))
        self.parts = PartsDirectory(self.path.with_name(self.path.name + ".parts"))
        self._finished_before = False
        self._removed = False
        self._done: dict[int, Part] = {}
        check_place(self.path)
        unfinished = self.parts.manifest.exists()
        self._check_flags(unfinished, resume=resume, overwrite=overwrite)
        with refusals_named(self.parts.path):
            self.parts.path.mkdir(exist_ok=True)
            self._lock = Lock(self.parts.path / LOCK)
        try:
            self._start(resume=resume)
        except BaseException:
            self._lock.release()
            raise

    def _start(self, *, resume: bool) -> None:
        self.resuming = resume and self.parts.manifest.exists()  # asked again: we hold the lock only now
        if not self.resuming:
            self.parts.clear(keep_lock=True)
            self._finished_before = resume and self.path.exists()

    def _check_flags(self, unfinished: bool, *, resume: bool, overwrite: bool) -> None:
        if resume or overwrite:
            return
        if unfinished:
            Lock(self.parts.path / LOCK).release()  # a job that runs now is refused as such
            done = len(list(self.parts.path.glob("part-*")))
            raise OutputError(
                f"{self.parts.path}: holds {done} finished parts of an earlier job; go on with --resume, or "
                "start over with --overwrite"
            )
        if self.path.exists():
            raise OutputError(f"{self.path}: exists; replace it with --overwrite, or give another -o")

    def spool_path(self, suffix: str) -> Path:
        """Where standard input is kept, so that it can be read twice and resumed."""
        return self.parts.path / f"input{suffix}"

    def recorded(self, name: str) -> object:
        """A field of the identity of the job that is resumed, or None where a job starts."""
        return self._resumed().get(name)

    def check(self, known: Identity) -> None:
        """Refuse to resume another job by what is ``known`` of this one already. Raises OutputError."""
        resumed = self._resumed()
        if resumed:
            where = self.parts.path if self.resuming else self.path
            check_same_job(where, {name: resumed.get(name) for name in known}, known)

    def _resumed(self) -> Identity:
        """The identity of the job that is resumed; empty where a job starts."""
        if self.resuming:
            return read_json(self.parts.manifest)
        return json_mapping(self._record(), "identity") if self._finished_before else {}

    def finished(self) -> Counts | None:
        """The counts of the job that is resumed, if an earlier run has finished it."""
        return Counts.from_json(json_mapping(self._record(), "counts")) if self._finished_before else None

    def begin(self, identity: Identity, writer: TableWriter, needed_bytes: int) -> dict[int, Counts]:
        self._writer, self._identity = writer, identity
        finished = self.finished()
        if finished is not None:
            check_same_job(self.path, self._resumed(), identity)
            return {-1: finished}
        if self.resuming:
            check_same_job(self.parts.path, read_json(self.parts.manifest), identity)
            self._done = self.parts.finished_parts()
        check_space(self.path.parent, needed_bytes - sum(part.num_bytes for part in self._done.values()))
        if not self.resuming:
            self.parts.write_manifest(identity)
        return {window: part.counts for window, part in self._done.items()}

    def _record(self) -> dict[str, object]:
        """Of the finished job: the output is there and no parts are. Raises OutputError where nothing says what job."""
        sidecar = sidecar_path(self.path)
        if not sidecar.exists():
            raise OutputError(f"{self.path}: exists, but no {sidecar.name} says which job made it; use --overwrite")
        return read_json(sidecar)

    @property
    def complete(self) -> bool:
        return self._finished_before

    def write(self, window: Window, write: Callable[[IO[bytes]], object], counts: Counts) -> None:
        self._done[window.index] = self.parts.write_part(window.index, self._writer.suffix, write, counts)

    def finish(self, windows: Sequence[Window], num_rows: int, about: Mapping[str, object]) -> None:
        """Assemble the final file, record the job beside it, and remove the parts."""
        done: list[Part] = [self._done[window.index] for window in windows]

        def join(file: IO[bytes]) -> None:
            self._join(file, [self.parts.path / part.file for part in done], windows, num_rows, done, about)

        write_durably(self.path, join, self.parts.path / OUTPUT)
        self.parts.clear(keep_lock=False)
        self._removed = True

    def _join(
        self,
        file: IO[bytes],
        paths: Sequence[Path],
        windows: Sequence[Window],
        num_rows: int,
        done: Sequence[Part],
        about: Mapping[str, object],
    ) -> None:
        self._writer.join(file, paths)
        file.flush()
        first = windows[0].first_row if windows else 0
        temporary = self.parts.path / OUTPUT
        record = {
            "version": FORMAT_VERSION,
            "identity": self._identity,
            "rows": [first, windows[-1].end_row if windows else first, num_rows],
            "output": {
                "bytes": temporary.stat().st_size,
                "sha256": file_digest(temporary),
                "header_bytes": len(self._writer.header),
            },
            "counts": Counts.total(part.counts for part in done).to_json(),
            "about": dict(about),
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_durably(sidecar_path(self.path), lambda f: f.write(text.encode()), self.parts.path / "sidecar.tmp")

    def close(self) -> None:
        """Release the output. A directory with nothing to resume is removed."""
        try:
            if not self._removed and not self.parts.manifest.exists():
                with suppress(OutputError):
                    self.parts.clear(keep_lock=False)
        finally:
            self._lock.release()


class StreamOutput:
    """Standard output: windows as they finish, in order. Nothing is kept, so nothing can be resumed."""

    def __init__(self, stream: IO[bytes] | None = None) -> None:
        self._stream = stream or sys.stdout.buffer

    @property
    def complete(self) -> bool:
        return False

    def begin(self, identity: Identity, writer: TableWriter, needed_bytes: int) -> dict[int, Counts]:
        if writer.suffix == ".parquet":
            raise UsageError("Parquet cannot go to standard output; use --output-format jsonl or csv, or -o FILE")
        self._stream.write(writer.header)
        return {}

    def write(self, window: Window, write: Callable[[IO[bytes]], object], counts: Counts) -> None:
        buffer = io.BytesIO()
        write(buffer)
        self._stream.write(buffer.getbuffer())
        self._stream.flush()

    def finish(self, windows: Sequence[Window], num_rows: int, about: Mapping[str, object]) -> None:
        self._stream.flush()

    def close(self) -> None:
        pass
