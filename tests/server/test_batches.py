"""The server's files and batches, killed and gone on with."""

import asyncio
import errno
import json
import os
import re
import signal
import sys
import time

import openai
import pytest

from moe_prefill.errors import OutputError
from moe_prefill.server import batchrunner
from moe_prefill.server.keys import Keys, new_key
from moe_prefill.server.store import Store

from .batches import StoppingEngine, ended, line, sdk, served, start
from .conftest import MODEL
from .helpers import FakeEngine, running


def test_the_openai_client_uploads_runs_and_downloads(tmp_path, make_service):
    async def go():
        async with served(tmp_path / "data", make_service()) as http:
            client = sdk(http)
            lines = [line(index) if index != 3 else line(3, {"prompt": "a"}) for index in range(600)]
            batch = await ended(client, (await start(client, lines)).id)
            assert batch.status == "completed"
            assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (
                600,
                599,
                1,
            )
            told = [json.loads(one) for one in (await client.files.content(batch.output_file_id)).text.splitlines()]
            assert [one["custom_id"] for one in told] == [str(index) for index in range(600) if index != 3]
            (failed,) = (await client.files.content(batch.error_file_id)).text.splitlines()
            assert json.loads(failed)["response"]["status_code"] == 400
            files = [file async for file in client.files.list()]
            assert {file.filename for file in files} == {
                "in.jsonl",
                f"{batch.id}_output.jsonl",
                f"{batch.id}_error.jsonl",
            }
            assert [one.id async for one in client.batches.list()] == [batch.id]
            await client.files.delete(batch.output_file_id)
            with pytest.raises(openai.NotFoundError):
                await client.files.content(batch.output_file_id)

    asyncio.run(go())
    assert not (tmp_path / "in.jsonl").exists()


def test_the_description_names_every_parameter_of_every_path(tmp_path, make_service):
    async def go():
        async with served(tmp_path / "data", make_service()) as http:
            return (await http.get("/openapi.json")).json()["paths"]

    paths = asyncio.run(go())
    assert "/v1/files/{file_id}/content" in paths
    for path, operations in paths.items():
        for operation in operations.values():
            told = [one["name"] for one in operation.get("parameters", []) if one["in"] == "path"]
            assert told == re.findall(r"{(\w+)}", path), path
    ids = [operation["operationId"] for operations in paths.values() for operation in operations.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["{"], "bad_json"),
        ([line(1), line(1)], "duplicate_custom_id"),
        ([line(1, {"query": "a", "documents": ["b"]}, "/rerank")], "mismatched_url"),
        ([""], "empty_file"),
    ],
)
def test_a_file_that_is_not_valid_fails_with_its_lines(tmp_path, make_service, lines, code):
    async def go():
        async with served(tmp_path / "data", make_service()) as http:
            batch = await ended(sdk(http), (await start(sdk(http), lines)).id)
            assert batch.status == "failed"
            assert batch.errors.data[0].code == code

    asyncio.run(go())


def test_a_batch_goes_on_after_a_restart_with_one_reply_a_line(tmp_path, make_service, tokenizer):
    lines = [line(index) for index in range(700)]
    first = StoppingEngine(-1, vocab_size=tokenizer.vocab_size)

    async def begin():
        async with served(tmp_path / "data", make_service(first, max_sweep_s=0.001)) as http:
            batch = await start(sdk(http), lines)
            while first.stats.requests < 300:
                await asyncio.sleep(0.002)
            first.gate.clear()  # the server dies in the middle of a chunk
            return batch.id

    async def go_on(batch_id):
        async with served(tmp_path / "data", make_service()) as http:
            batch = await ended(sdk(http), batch_id)
            assert batch.status == "completed"
            text = (await sdk(http).files.content(batch.output_file_id)).text
            assert [json.loads(one)["custom_id"] for one in text.splitlines()] == [str(i) for i in range(700)]

    batch_id = asyncio.run(begin())
    output = max((tmp_path / "data/files").iterdir(), key=lambda path: path.stat().st_mtime)
    with output.open("ab") as file:  # a write that the store was not told of
        file.write(b'{"custom_id": "half')
    asyncio.run(go_on(batch_id))


def test_a_batch_can_be_cancelled_and_keeps_what_it_has(tmp_path, make_service, tokenizer):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)

    async def go():
        async with served(tmp_path / "data", make_service(engine)) as http:
            client = sdk(http)
            engine.gate.clear()
            batch = await start(client, [line(index) for index in range(300)])
            while not engine.calls:
                await asyncio.sleep(0.005)
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
            with pytest.raises(openai.ConflictError):
                await client.files.delete(batch.input_file_id)
            engine.gate.set()
            batch = await ended(client, batch.id)
            assert batch.status == "cancelled"
            assert (await client.batches.cancel(batch.id)).status == "cancelled"

    asyncio.run(go())


def test_a_full_disk_stops_a_batch_until_there_is_room(tmp_path, make_service, monkeypatch):
    append, refusals = batchrunner._append, []

    def full(path, end, lines):
        if lines and len(refusals) < 2:
            refusals.append(path)
            with path.open("ab") as file:
                file.write(lines[0][:10])  # what still fitted
            raise OSError(errno.ENOSPC, "no space left")
        return append(path, end, lines)

    monkeypatch.setattr(batchrunner, "_append", full)
    monkeypatch.setattr(batchrunner, "_PAUSE_S", 0.01)

    async def go():
        async with served(tmp_path / "data", make_service()) as http:
            client = sdk(http)
            batch = await ended(client, (await start(client, list(map(line, range(5))))).id)
            text = (await client.files.content(batch.output_file_id)).text
            assert [json.loads(one)["custom_id"] for one in text.splitlines()] == list("01234")

    asyncio.run(go())
    assert len(refusals) == 2


def test_another_tenant_sees_nothing(tmp_path, make_service):
    made = [new_key(tenant) for tenant in ("red", "blue")]
    path = tmp_path / "keys.toml"
    path.write_text("\n".join(entry for _, entry in made))
    keys = Keys.read(str(path))

    async def go():
        async with served(tmp_path / "data", make_service(keys=keys), keys) as http:
            red, blue = (sdk(http, key) for key, _ in made)
            batch = await ended(red, (await start(red, [line(1)])).id)
            assert [file async for file in blue.files.list()] == []
            assert [one async for one in blue.batches.list()] == []
            for attempt in (
                blue.files.retrieve(batch.output_file_id),
                blue.files.content(batch.output_file_id),
                blue.files.delete(batch.input_file_id),
                blue.batches.retrieve(batch.id),
                blue.batches.cancel(batch.id),
                blue.batches.create(
                    input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h"
                ),
            ):
                with pytest.raises(openai.NotFoundError):
                    await attempt

    asyncio.run(go())


def test_uploads_are_bounded_and_checked(tmp_path, make_service):
    async def go():
        async with served(tmp_path / "data", make_service(), max_bytes=100_000) as http:
            large = await http.post("/v1/files", files={"file": b"x" * 100_001}, data={"purpose": "batch"})
            assert large.status_code == 413
            huge = await http.post("/v1/files", files={"file": b"x" * 400_000}, data={"purpose": "batch"})
            assert huge.status_code == 413
            for wrong in ({"json": {}}, {"files": {"file": b"x"}, "data": {"purpose": "fine-tune"}}):
                assert (await http.post("/v1/files", **wrong)).status_code == 400
            zipped = {"files": {"file": b"x"}, "data": {"purpose": "batch"}, "headers": {"Content-Encoding": "gzip"}}
            assert (await http.post("/v1/files", **zipped)).status_code == 415
            broken = {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
            assert (await http.post("/v1/files", **broken)).status_code == 400
            for path in ("/v1/files/..%2f..%2fetc%2fpasswd", "/v1/files/../lock/content", "/v1/batches/x"):
                assert (await http.get(path)).status_code == 404
            assert (
                await http.post("/v1/batches", json={"input_file_id": "file-0", "endpoint": "/x"})
            ).status_code == 400

    asyncio.run(go())
    assert list((tmp_path / "data/files").iterdir()) == [], "nothing of what was refused is left"


def test_a_data_directory_has_one_server(tmp_path):
    store = Store(tmp_path / "data")
    with pytest.raises(OutputError):
        Store(tmp_path / "data")
    store.close()
    Store(tmp_path / "data").close()


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="needs process groups")
def test_the_command_serves_drains_and_goes_on_with_its_batch(tmp_path):
    """The whole server as a process: killed with a batch half done, started again, ended by SIGTERM."""
    command = [sys.executable, "-m", "moe_prefill.cli", "serve", "--model", str(MODEL), "--port", "0"]
    command += [
        "--served-model-name",
        "demo",
        "--warmup",
        "off",
        "--data-dir",
        str(tmp_path / "data"),
        "--threads",
        "1",
    ]
    with running(command, tmp_path) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            lines = [line(index, {"prompt": f"{index}", "max_tokens": 1}) for index in range(600)]
            upload = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
            batch = client.batches.create(input_file_id=upload.id, endpoint="/v1/completions", completion_window="24h")
            while client.batches.retrieve(batch.id).request_counts.completed == 0:
                time.sleep(0.02)
        process.kill()
    with running(command, tmp_path) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            before = client.batches.retrieve(batch.id)
            assert 0 < before.request_counts.completed < 600
            assert client.completions.create(model="demo", prompt="a", max_tokens=1).choices[0].text
            while client.batches.retrieve(batch.id).status != "completed":
                time.sleep(0.05)
            text = client.files.content(client.batches.retrieve(batch.id).output_file_id).text
        assert [json.loads(one)["custom_id"] for one in text.splitlines()] == [str(index) for index in range(600)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
