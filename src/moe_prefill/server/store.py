"""Files and batches on disk: SQLite (write-ahead log) for what is known of them, a directory for their content.

A file's content lies under its random id; the name that a client gave is never part of a path. Every question names the
tenant, and what belongs to another one does not exist.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import OutputError
from ..jobs.durable import Lock

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ACTIVE: Sequence[Status] = ("validating", "in_progress", "finalizing", "cancelling")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, tenant TEXT NOT NULL, status TEXT NOT NULL,
    created_at INTEGER NOT NULL, number INTEGER NOT NULL, facts TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status, number);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch and how far it is: bytes of its three files, and lines by outcome. Times are seconds since 1970."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_file_id: str  # its content grows; the file is listed once the batch has ended
    error_file_id: str
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    errors: list[dict[str, Any]] | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_end: int = 0
    output_end: int = 0
    error_end: int = 0
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    def moved(self, status: Status, **changes: Any) -> Batch:
        """In another status, with the time of it."""
        return replace(self, status=status, **{f"{status}_at": int(time.time()), **changes})

    def to_json(self) -> dict[str, Any]:
        ended = self.status in ("completed", "expired", "cancelled")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id if ended and self.output_end else None,
            "error_file_id": self.error_file_id if ended and self.error_end else None,
            **{field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_at")},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }


class Store:
    """All files and batches of one data directory, which no other process may use meanwhile. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        """Open or make the directory. Raises OutputError when another server has it or it cannot be written."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files = directory / "files"
            self._files.mkdir(mode=0o700, exist_ok=True)
            self._owner = Lock(directory / "lock")
            self._db = sqlite3.connect(directory / "batches.sqlite", check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise OutputError(f"{directory}: cannot hold files and batches: {error}") from error
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._owner.release()

    def path(self, file_id: str) -> Path:
        """Where a file's content is; ``file_id`` is one of ours."""
        assert file_id.removeprefix("file-").isalnum(), file_id
        return self._files / file_id

    def add_file(self, file: StoredFile) -> None:
        """Make a file known whose content is in its place."""
        with self._lock:
            values = asdict(file)
            marks = ", ".join("?" * len(values))
            self._db.execute(f"INSERT OR REPLACE INTO files VALUES ({marks})", list(values.values()))

    def file(self, file_id: str, tenant: str) -> StoredFile | None:
        rows = self._select("SELECT * FROM files WHERE id = ? AND tenant = ?", file_id, tenant)
        return StoredFile(**rows[0]) if rows else None

    def files(self, tenant: str) -> list[StoredFile]:
        """The newest first."""
        rows = self._select("SELECT * FROM files WHERE tenant = ? ORDER BY created_at DESC, rowid DESC", tenant)
        return [StoredFile(**row) for row in rows]

    def delete_file(self, file_id: str, tenant: str) -> bool:
        with self._lock:
            found = self._db.execute("DELETE FROM files WHERE id = ? AND tenant = ?", (file_id, tenant)).rowcount
        if found:
            self.path(file_id).unlink(missing_ok=True)
        return bool(found)

    def in_use(self, file_id: str) -> bool:
        """Whether a batch that has not ended reads the file."""
        return any(batch.input_file_id == file_id for batch in self.active())

    def put(self, batch: Batch) -> None:
        """Keep a batch's present state; on the disk when this returns."""
        with self._lock:
            self._db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, (SELECT COALESCE(MAX(number), 0) + 1 FROM batches), ?) "
                "ON CONFLICT (id) DO UPDATE SET status = excluded.status, facts = excluded.facts",
                (batch.id, batch.tenant, batch.status, batch.created_at, json.dumps(asdict(batch))),
            )

    def cancel(self, batch_id: str, tenant: str) -> Batch | None:
        """Mark a batch that has not ended; None where there is none."""
        with self._lock:
            row = self._db.execute(
                "SELECT facts FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)
            ).fetchone()
            if row is None:
                return None
            batch = Batch(**json.loads(row[0]))
            if batch.status not in ("validating", "in_progress"):
                return batch
            batch = batch.moved("cancelling")
            self._db.execute(
                "UPDATE batches SET status = ?, facts = ? WHERE id = ?",
                (batch.status, json.dumps(asdict(batch)), batch.id),
            )
            return batch

    def advance(self, before: Batch, after: Batch) -> bool:
        """Keep ``after`` where the batch is still in the status of ``before``; False where someone cancelled it."""
        with self._lock:
            return bool(
                self._db.execute(
                    "UPDATE batches SET status = ?, facts = ? WHERE id = ? AND status = ?",
                    (after.status, json.dumps(asdict(after)), after.id, before.status),
                ).rowcount
            )

    def batch(self, batch_id: str, tenant: str) -> Batch | None:
        rows = self._select("SELECT facts FROM batches WHERE id = ? AND tenant = ?", batch_id, tenant)
        return _batch(rows[0]) if rows else None

    def batches(self, tenant: str) -> list[Batch]:
        """The newest first."""
        return [
            _batch(row)
            for row in self._select("SELECT facts FROM batches WHERE tenant = ? ORDER BY number DESC", tenant)
        ]

    def active(self) -> list[Batch]:
        """Those of all tenants that have not ended, the oldest first."""
        marks = ", ".join("?" * len(ACTIVE))
        return [
            _batch(row)
            for row in self._select(f"SELECT facts FROM batches WHERE status IN ({marks}) ORDER BY number", *ACTIVE)
        ]

    def _select(self, query: str, *values: object) -> list[dict[str, Any]]:
        with self._lock, closing(self._db.execute(query, values)) as cursor:
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def new_id(kind: Literal["file-", "batch_"]) -> str:
    return kind + secrets.token_hex(16)


def _batch(row: dict[str, Any]) -> Batch:
    return Batch(**json.loads(row["facts"]))
