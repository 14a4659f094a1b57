"""Works off the batches of the store, a few lines at a time, in the lane behind interactive requests.

Replies are appended to the batch's files and synced, then the store is told how far they reach. After a crash the
files are cut back to what the store knows, so every line has one reply.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .batchlines import Chunk, Line, read_chunks, refused_answer, reply_line
from .keys import ANYONE, Caller
from .service import Answer, Service
from .store import Batch, Store, StoredFile

_log = logging.getLogger(__name__)

_CHUNK_LINES = 256
_CHUNK_BYTES = 1 << 20
_MAX_LINES = 50_000
_MAX_ERRORS = 20  # told of a file that is not valid
_PAUSE_S = 5.0  # after the disk or the engine refused
# Replies that say nothing about a line: it is asked again.
_AGAIN = frozenset({"draining", "starting", "not_served", "engine_lost"})


class BatchRunner:
    """One task that gives every active batch a chunk of lines in turn."""

    def __init__(self, store: Store, service: Service, salts: dict[str, str]) -> None:
        """``salts``: tenant -> the salt of its requests."""
        self.store = store
        self._service = service
        self._salts = salts
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There may be a new batch, or one to cancel."""
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled; a chunk that is not finished then is asked again after the next start."""
        while True:
            self._wake.clear()
            if self._service.scheduler.state != "ready":
                await asyncio.sleep(0.2)
                continue
            active = await asyncio.to_thread(self.store.active)
            for batch in active:
                try:
                    await self._step(batch)
                except (OSError, sqlite3.OperationalError, _NotNow) as error:
                    _log.warning("batch %s waits: %s", batch.id, error)
                    await asyncio.sleep(_PAUSE_S)
            if not active:
                await self._wake.wait()

    async def _step(self, batch: Batch) -> None:
        """The next piece of one batch."""
        after: Batch | None
        match batch.status:
            case "validating":
                after = await asyncio.to_thread(validated, batch, self.store.path(batch.input_file_id))
            case "in_progress" if time.time() > batch.expires_at:
                after = await asyncio.to_thread(self._ended, batch.moved("expired"))
            case "in_progress":
                after = await self._answer_chunk(batch)
            case "finalizing":
                after = await asyncio.to_thread(self._ended, batch.moved("completed"))
            case "cancelling":
                after = await asyncio.to_thread(self._ended, batch.moved("cancelled"))
            case _:
                return
        await asyncio.to_thread(self.store.advance, batch, after)

    async def _answer_chunk(self, batch: Batch) -> Batch:
        path = self.store.path(batch.input_file_id)
        chunk = await asyncio.to_thread(_next_chunk, path, batch)
        if chunk is None:
            return batch.moved("finalizing")
        caller = Caller(batch.tenant, self._salts.get(batch.tenant, "")) if batch.tenant else ANYONE
        answers = await asyncio.gather(*(self._answer(line, caller) for line in chunk.lines))
        again = next((answer.code for answer in answers if answer.code in _AGAIN), None)
        if again is not None:
            raise _NotNow(again)
        return await asyncio.to_thread(self._written, batch, chunk, answers)

    async def _answer(self, line: Line, caller: Caller) -> Answer:
        if line.endpoint is None:
            return refused_answer(line)
        return await self._service.answer(line.endpoint, line.body, caller=caller, lane="batch")

    def _written(self, batch: Batch, chunk: Chunk, answers: Sequence[Answer]) -> Batch:
        """The batch with a chunk's replies in its files."""
        good: list[bytes] = []
        bad: list[bytes] = []
        for line, answer in zip(chunk.lines, answers, strict=True):
            (good if answer.status == 200 else bad).append(reply_line(line, answer))
        return replace(
            batch,
            input_end=chunk.end,
            output_end=_append(self.store.path(batch.output_file_id), batch.output_end, good),
            error_end=_append(self.store.path(batch.error_file_id), batch.error_end, bad),
            completed=batch.completed + len(good),
            failed=batch.failed + len(bad),
        )

    def _ended(self, batch: Batch) -> Batch:
        """Make the files of a batch that has ended known."""
        for file_id, kind, size in (
            (batch.output_file_id, "output", batch.output_end),
            (batch.error_file_id, "error", batch.error_end),
        ):
            _append(self.store.path(file_id), size, [])  # a chunk that was cancelled meanwhile is not part of it
            if size:
                self.store.add_file(
                    StoredFile(
                        id=file_id,
                        tenant=batch.tenant,
                        filename=f"{batch.id}_{kind}.jsonl",
                        purpose="batch_output",
                        bytes=size,
                        created_at=int(time.time()),
                    )
                )
        return batch


class _NotNow(Exception):
    """The engine or server stopped before a chunk was answered."""


def validated(batch: Batch, path: Path) -> Batch:
    """In progress; or failed, with the first errors of the file: its lines, their endpoint, their ids."""
    errors: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    total = 0

    def add(code: str, message: str, param: str | None, number: int | None) -> None:
        if len(errors) < _MAX_ERRORS:
            errors.append({"code": code, "message": message, "param": param, "line": number})

    for chunk in read_chunks(path, 0, 1, _CHUNK_LINES, _CHUNK_BYTES):
        for line in chunk.lines:
            total += 1
            if line.refused is not None:
                add(line.refused.code, str(line.refused), line.refused.param, line.number)
                continue
            if line.path != batch.endpoint:
                add("mismatched_url", f"url is {line.path}, the batch's endpoint {batch.endpoint}", "url", line.number)
            digest = hashlib.blake2b((line.custom_id or "").encode(), digest_size=16).digest()
            if digest in seen:
                add(
                    "duplicate_custom_id", f"custom_id of line {line.number} is there already", "custom_id", line.number
                )
            seen.add(digest)
        if total > _MAX_LINES:
            add("too_many_lines", f"a batch has at most {_MAX_LINES} lines; send it in parts", None, None)
            break
    if not total:
        add("empty_file", "the file has no line", None, None)
    if errors:
        return batch.moved("failed", errors=errors, total=total)
    return batch.moved("in_progress", total=total)


def _next_chunk(path: Path, batch: Batch) -> Chunk | None:
    first = batch.completed + batch.failed + 1
    return next(read_chunks(path, batch.input_end, first, _CHUNK_LINES, _CHUNK_BYTES), None)


def _append(path: Path, end: int, lines: Sequence[bytes]) -> int:
    """Put lines at ``end``, where whatever an earlier attempt left is cut away; returns the new end, synced."""
    if not lines and not path.exists():
        return end
    with path.open("r+b" if path.exists() else "xb") as file:
        file.truncate(end)
        file.seek(end)
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()
