"""OUTPUT.parts: the finished windows of a job, from which it can be resumed and the final file is assembled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import OutputError
from .counts import Counts
from .durable import file_digest, refusals_named, sync_directory, write_durably

MANIFEST, JOURNAL, LOCK, OUTPUT = "manifest.json", "journal.jsonl", "lock", "output.tmp"
_OURS = ("part-*", ".part-*.tmp", ".manifest.json.tmp", "input.*", ".input.*.tmp", OUTPUT, JOURNAL, "sidecar.tmp", LOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One line of the journal: a window whose rows are on the disk."""

    window: int
    file: str
    num_bytes: int
    sha256: str
    counts: Counts

    def to_json(self) -> dict[str, object]:
        return {
            "window": self.window,
            "file": self.file,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "counts": self.counts.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Part:
        window, file, num_bytes, sha256, counts = (data[n] for n in ("window", "file", "bytes", "sha256", "counts"))
        assert isinstance(window, int)
        assert isinstance(file, str)
        assert isinstance(num_bytes, int)
        assert isinstance(sha256, str)
        assert isinstance(counts, dict)
        return cls(window=window, file=file, num_bytes=num_bytes, sha256=sha256, counts=Counts.from_json(counts))


class PartsDirectory:
    """The parts of one output. One process at a time writes here (see ``Lock``).

    Order of events for a window: the part is written under a temporary name, flushed, renamed, its directory flushed;
    then its line is appended to the journal and flushed. A part without a line is computed again and gets the same
    content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    def part_path(self, window: int, suffix: str) -> Path:
        return self.path / f"part-{window:06d}{suffix}"

    def write_manifest(self, identity: Mapping[str, object]) -> None:
        text = json.dumps(identity, indent=1, ensure_ascii=False) + "\n"
        write_durably(self.manifest, lambda file: file.write(text.encode()))

    def write_part(self, window: int, suffix: str, write: Callable[[IO[bytes]], object], counts: Counts) -> Part:
        """Write one window's rows and journal them."""
        path = self.part_path(window, suffix)
        write_durably(path, write)
        part = Part(
            window=window, file=path.name, num_bytes=path.stat().st_size, sha256=file_digest(path), counts=counts
        )
        self._append(json.dumps(part.to_json(), ensure_ascii=False).encode() + b"\n")
        return part

    def _append(self, line: bytes) -> None:
        journal = self.path / JOURNAL
        with refusals_named(journal), journal.open("ab") as file:
            end = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise

    def finished_parts(self) -> dict[int, Part]:
        """The journalled parts whose files are there with the right size and content, by window.

        Removes temporary files and a line that was cut off in the middle.
        """
        for leftover in [*self.path.glob(".*.tmp"), self.path / OUTPUT]:
            leftover.unlink(missing_ok=True)
        return {part.window: part for part in self._journal() if self._is_whole(part)}

    def _journal(self) -> list[Part]:
        journal = self.path / JOURNAL
        if not journal.exists():
            return []
        data = journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with refusals_named(journal), journal.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        try:
            return [Part.from_json(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, KeyError, AssertionError) as error:
            raise OutputError(f"{journal}: damaged ({error!r}); start over with --overwrite") from error

    def _is_whole(self, part: Part) -> bool:
        path = self.path / part.file
        return path.is_file() and path.stat().st_size == part.num_bytes and file_digest(path) == part.sha256

    def clear(self, *, keep_lock: bool) -> None:
        """Remove our files, the manifest first: without it a directory holds nothing to resume.

        Raises OutputError when the directory also holds files that are not ours.
        """
        if not self.path.exists():
            return
        with refusals_named(self.path):
            self.manifest.unlink(missing_ok=True)
            sync_directory(self.path)
            for path in [path for pattern in _OURS for path in self.path.glob(pattern)]:
                if not (keep_lock and path.name == LOCK):
                    path.unlink(missing_ok=True)
            if keep_lock:
                return
            foreign = sorted(path.name for path in self.path.iterdir())
            if foreign:
                raise OutputError(
                    f"{self.path}: not removed, it holds files that are not of this job: {', '.join(foreign[:5])}"
                )
            self.path.rmdir()
