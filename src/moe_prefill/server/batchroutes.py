"""/v1/files and /v1/batches in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json, to_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.types import Message

from .app import Door, check_plain, read_body
from .batchrunner import BatchRunner
from .endpoints import BY_PATH
from .keys import Caller
from .refusals import Refused, bad_request
from .service import Answer, told
from .store import Batch, Store, StoredFile, new_id

_WINDOW_S = 24 * 3600
_UPLOAD_S = 600.0
_MAX_LISTED = 100


class BatchBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


def add_batch_routes(app: FastAPI, runner: BatchRunner, max_bytes: int) -> None:
    """Add the routes; ``max_bytes`` of one file."""
    door: Door = app.state.door
    files, batches = _Files(runner.store), _Batches(runner, door)
    uploads = _Uploads(runner.store, max_bytes)
    for method, path, handle, summary in (
        ("POST", "/v1/files", uploads.receive, "Upload a file of batch lines (multipart: purpose, file)."),
        ("GET", "/v1/files", files.all, "Your files, the newest first."),
        ("GET", "/v1/files/{file_id}", files.one, "What is known of a file."),
        ("DELETE", "/v1/files/{file_id}", files.delete, "Delete a file."),
        ("POST", "/v1/batches", batches.create, "Start a batch over an uploaded file."),
        ("GET", "/v1/batches", batches.all, "Your batches, the newest first."),
        ("GET", "/v1/batches/{batch_id}", batches.one, "How far a batch is."),
        ("POST", "/v1/batches/{batch_id}/cancel", batches.cancel, "Stop a batch; what it has done is kept."),
    ):
        serve = _opening(door, path, handle)
        app.add_api_route(path, serve, methods=[method], summary=summary, name=f"{method} {path}")

    @app.get("/v1/files/{file_id}/content", summary="The content of a file.")
    async def content(request: Request, file_id: str) -> Response:
        found: list[Path] = []

        async def find(request: Request, caller: Caller, request_id: str) -> Answer:
            found.append(await files.path(file_id, caller))
            return _json({})

        response = await door.open(request, "/v1/files/{file_id}/content", find)
        return FileResponse(found[0], media_type="application/jsonl") if found else response


def _opening(
    door: Door, path: str, handle: Callable[..., Awaitable[Answer]]
) -> Callable[[Request], Awaitable[Response]]:
    """A route that goes through the door; parts of the path are arguments of ``handle``."""

    async def answered(request: Request, caller: Caller, request_id: str) -> Answer:
        try:
            return await handle(request, caller, **request.path_params)
        except sqlite3.OperationalError as error:
            raise Refused(507, "disk_full", f"the server cannot keep this: {error}; try again later") from error

    async def serve(request: Request) -> Response:
        return await door.open(request, path, answered)

    return serve


class _Files:
    """What a caller may do with the files that are there. Those of another tenant are not there."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self, request: Request, caller: Caller) -> Answer:
        files = await asyncio.to_thread(self._store.files, caller.tenant)
        purpose = request.query_params.get("purpose")
        return _page(request, [file.to_json() for file in files if purpose in (None, file.purpose)])

    async def one(self, request: Request, caller: Caller, file_id: str) -> Answer:
        return _json((await _file(self._store, file_id, caller)).to_json())

    async def delete(self, request: Request, caller: Caller, file_id: str) -> Answer:
        await _file(self._store, file_id, caller)
        if await asyncio.to_thread(self._store.in_use, file_id):
            raise Refused(409, "file_in_use", "a batch reads the file; cancel it first, or wait until it has ended")
        await asyncio.to_thread(self._store.delete_file, file_id, caller.tenant)
        return _json({"id": file_id, "object": "file", "deleted": True})

    async def path(self, file_id: str, caller: Caller) -> Path:
        await _file(self._store, file_id, caller)
        return self._store.path(file_id)


class _Batches:
    """What a caller may do with batches."""

    def __init__(self, runner: BatchRunner, door: Door) -> None:
        self._store, self._wake, self._limits = runner.store, runner.wake, door.limits

    async def create(self, request: Request, caller: Caller) -> Answer:
        body = _batch_body(await read_body(request, self._limits))
        await _file(self._store, body.input_file_id, caller)
        batch = _new_batch(body, caller)
        await asyncio.to_thread(self._store.put, batch)
        self._wake()
        return _json(batch.to_json())

    async def all(self, request: Request, caller: Caller) -> Answer:
        batches = await asyncio.to_thread(self._store.batches, caller.tenant)
        return _page(request, [batch.to_json() for batch in batches])

    async def one(self, request: Request, caller: Caller, batch_id: str) -> Answer:
        return _json(_found(await asyncio.to_thread(self._store.batch, batch_id, caller.tenant)).to_json())

    async def cancel(self, request: Request, caller: Caller, batch_id: str) -> Answer:
        batch = _found(await asyncio.to_thread(self._store.cancel, batch_id, caller.tenant))
        self._wake()
        return _json(batch.to_json())


class _Uploads:
    """Takes files in, their size bounded while they arrive."""

    def __init__(self, store: Store, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    async def receive(self, request: Request, caller: Caller) -> Answer:
        check_plain(request)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise bad_request("bad_upload", "a file is sent as multipart/form-data with the fields purpose and file")
        bounded = Request(request.scope, _bounded(request, self._max_bytes + 65536))
        try:
            async with (
                asyncio.timeout(_UPLOAD_S),
                bounded.form(max_files=1, max_fields=4, max_part_size=4096) as form,
            ):
                upload, purpose = form.get("file"), form.get("purpose")
                if not isinstance(upload, UploadFile):
                    raise bad_request("bad_upload", "the field file is missing", "file")
                if purpose != "batch":
                    raise bad_request("bad_purpose", "purpose is batch", "purpose")
                return _json((await asyncio.to_thread(self._keep, upload, caller)).to_json())
        except MultiPartException as error:
            raise bad_request("bad_upload", f"the form cannot be read: {error.message}") from None
        except TimeoutError:
            raise Refused(408, "slow_body", f"the file did not arrive within {_UPLOAD_S:.0f} s") from None

    def _keep(self, upload: UploadFile, caller: Caller) -> StoredFile:
        file_id = new_id("file-")
        path = self._store.path(file_id)
        try:
            with path.open("xb") as target:
                _copy(upload.file, target)
            size = path.stat().st_size
            if size > self._max_bytes:
                raise _too_large(self._max_bytes)
            file = StoredFile(
                id=file_id,
                tenant=caller.tenant,
                filename=Path(upload.filename or "upload.jsonl").name[:255],
                purpose="batch",
                bytes=size,
                created_at=int(time.time()),
            )
            self._store.add_file(file)
        except (OSError, sqlite3.OperationalError) as error:
            path.unlink(missing_ok=True)
            why = getattr(error, "strerror", None) or error  # not the path
            raise Refused(507, "disk_full", f"the server cannot keep the file: {why}") from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return file


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    shutil.copyfileobj(source, target, 1 << 20)
    target.flush()
    os.fsync(target.fileno())


def _bounded(request: Request, max_bytes: int) -> Callable[[], Awaitable[Message]]:
    """The request's messages, until they are too many bytes."""
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > max_bytes:
            raise _too_large(max_bytes)
        return message

    return receive


def _too_large(limit: int) -> Refused:
    return Refused(413, "file_too_large", f"the file is larger than {limit} bytes; send it in parts", param="file")


def _batch_body(raw: bytes) -> BatchBody:
    try:
        body = BatchBody.model_validate(from_json(raw, allow_inf_nan=False))
    except ValidationError as error:
        raise told(error) from None
    except ValueError as error:
        raise bad_request("bad_json", f"the body is not valid JSON: {error}") from None
    if body.endpoint not in BY_PATH:
        raise bad_request("bad_endpoint", f"endpoint is one of {', '.join(BY_PATH)}", "endpoint")
    if body.completion_window != "24h":
        raise bad_request("bad_window", "completion_window is 24h", "completion_window")
    if body.metadata and (
        len(body.metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in body.metadata.items())
    ):
        raise bad_request("bad_metadata", "metadata has at most 16 keys of 64 characters, values of 512", "metadata")
    return body


def _new_batch(body: BatchBody, caller: Caller) -> Batch:
    now = int(time.time())
    return Batch(
        id=new_id("batch_"),
        tenant=caller.tenant,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + _WINDOW_S,
        output_file_id=new_id("file-"),
        error_file_id=new_id("file-"),
        metadata=body.metadata,
    )


async def _file(store: Store, file_id: str, caller: Caller) -> StoredFile:
    file = await asyncio.to_thread(store.file, file_id, caller.tenant)
    if file is None:
        raise Refused(404, "not_found", "you have no such file", param="file_id")
    return file


def _found(batch: Batch | None) -> Batch:
    if batch is None:
        raise Refused(404, "not_found", "you have no such batch", param="batch_id")
    return batch


def _page(request: Request, entries: list[dict[str, Any]]) -> Answer:
    """A part of a list: ``limit`` entries (20) behind the one called ``after``."""
    limit = request.query_params.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= 10_000:
        raise bad_request("bad_limit", "limit is a number from 1 to 10000", "limit")
    after = request.query_params.get("after")
    ids = [entry["id"] for entry in entries]
    if after is not None:
        if after not in ids:
            raise bad_request("bad_after", "after is the id of an entry of the list", "after")
        entries = entries[ids.index(after) + 1 :]
    page = entries[: min(int(limit), _MAX_LISTED)]
    return _json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(entries) > len(page),
        }
    )


def _json(value: object) -> Answer:
    return Answer(status=200, body=to_json(value))
