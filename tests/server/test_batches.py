"""Batch files: run-batch and the server's files and batches, killed and gone on with."""

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

from moe_prefill.errors import InputError, OutputError, UsageError
from moe_prefill.server import batchrunner, runbatch
from moe_prefill.server.endpoints import BY_PATH
from moe_prefill.server.keys import Keys, new_key
from moe_prefill.server.runbatch import check_paths, known_job, run_batch
from moe_prefill.server.store import Store

from .batches import ended, line, sdk, served, start
from .conftest import MODEL
from .helpers import FakeEngine, running

BODIES = {
    path: dict(endpoint.forms[-1].example)
    for path, endpoint in BY_PATH.items()
    if path not in ("/predict", "/classify")
}
BODIES["/classify"] = {"input": ["a"], "labels": ["spam", "ham"]}


def steady(text):
    """Reply lines without what is drawn anew: ids and times."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(entry) for key, entry in value.items() if key not in ("id", "request_id", "created")}
        return value

    return [strip(json.loads(one)) for one in text.splitlines()]


class Stopped(Exception):
    """The run ends here, as by a kill."""


class StoppingEngine(FakeEngine):
    def __init__(self, calls, **settings):
        super().__init__(**settings)
        self.left = calls

    def score(self, requests):
        if self.left == 0:
            raise Stopped
        self.left -= 1
        return super().score(requests)


def run(source, output, make_service, engine=None, **options):
    service = make_service(engine)
    known = known_job(source, service.context, options.pop("model", "m"), {})
    options = {"resume": False, "overwrite": False, **options}
    return run_batch(source, output, service.context, service.scheduler.engine, known=known, **options)


def test_every_endpoint_can_be_asked_in_a_batch_and_replies_are_in_order(tmp_path, make_service):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line(f"{index}", body, path) for index, (path, body) in enumerate(BODIES.items())]
    source.write_text("\n".join(lines) + "\n\n")
    done = run(source, output, make_service)
    told = [json.loads(one) for one in output.read_text().splitlines()]
    assert [one["custom_id"] for one in told] == [str(index) for index in range(len(lines))]
    assert [one["response"]["status_code"] for one in told] == [200] * len(lines), told
    assert (done.completed, done.failed) == (len(lines), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_bad_line_has_its_error_and_leaves_the_others_alone(tmp_path, make_service):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = ["{", "[]", line("x", url="/v1/embeddings"), line("", {}), line("y", {"prompt": "a"})]
    source.write_text("\n".join([line("a"), *bad, line("b")]))
    done = run(source, output, make_service)
    told = [json.loads(one) for one in output.read_text().splitlines()]
    assert (done.completed, done.failed) == (2, 5)
    assert [one["response"] and one["response"]["status_code"] for one in told] == [200, *[None] * 4, 400, 200]
    assert all(one["error"]["code"] for one in told[1:5])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path, make_service):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a") + "\r\n" + line("b") + "\r\n", encoding="utf-8-sig")
    assert run(source, output, make_service).completed == 2


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not(tmp_path, make_service, tokenizer, monkeypatch):
    monkeypatch.setattr(runbatch, "_CHUNK_LINES", 4)
    source, output, plain = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "plain.jsonl"))
    source.write_text("\n".join(line(index) if index % 5 else "broken" for index in range(30)))
    run(source, plain, make_service)
    engine = StoppingEngine(3, vocab_size=tokenizer.vocab_size)
    with pytest.raises(Stopped):
        run(source, output, make_service, engine)
    assert not output.exists()
    (tmp_path / ".out.jsonl.part").open("ab").write(b"half a li")  # written, but not in the journal
    engine.left = -1
    done = run(source, output, make_service, engine, resume=True)
    assert done.lines == 30
    assert sum(map(len, engine.calls)) == 24, "what was finished is not computed again"
    assert steady(output.read_text()) == steady(plain.read_text())


def test_a_run_of_other_input_or_settings_is_not_gone_on_with(tmp_path, make_service, tokenizer, monkeypatch):
    monkeypatch.setattr(runbatch, "_CHUNK_LINES", 2)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(line, range(6))))
    engine = StoppingEngine(1, vocab_size=tokenizer.vocab_size)
    with pytest.raises(Stopped):
        run(source, output, make_service, engine)
    with pytest.raises(OutputError, match='weights: "m" there, "other" now'):
        run(source, output, make_service, engine, resume=True, model="other")
    source.write_text("\n".join(map(line, range(7))))
    with pytest.raises(OutputError, match="the rows"):
        run(source, output, make_service, engine, resume=True)
    (tmp_path / ".out.jsonl.batch.json").write_text('{"job": "of an older version"}')
    with pytest.raises(OutputError, match="start anew"):
        run(source, output, make_service, engine, resume=True)


def test_paths_are_checked_before_a_model_is_loaded(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line(1))
    output.write_text("old")
    from pathlib import Path

    for wrong, error in (
        ((Path("https://host/in.jsonl"), output), UsageError),
        ((tmp_path / "none", output), InputError),
        ((source, tmp_path / "none/out"), OutputError),
        ((source, source), OutputError),
        ((source, output), OutputError),
    ):
        with pytest.raises(error):
            check_paths(*wrong, resume=False, overwrite=False)
    check_paths(source, output, resume=False, overwrite=True)


def test_the_command_reads_files_and_settings(tmp_path, tokenizer, monkeypatch, capsys):
    from moe_prefill.cli import main

    made = []
    monkeypatch.setattr("moe_prefill.workers.build_scoring", lambda config: made.append(config) or fake)
    fake = FakeEngine(vocab_size=tokenizer.vocab_size)
    source, output, settings = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "settings.toml"
    source.write_text(line("a", {"prompt": "a"}))
    settings.write_text(f'[server]\ndefault_max_tokens = 1\n[engine]\nmodel = "{MODEL}"\ndtype = "float32"\n')
    command = ["run-batch", "-i", str(source), "-o", str(output), "--config", str(settings)]
    assert main(command) == 0
    assert json.loads(output.read_text())["response"]["status_code"] == 200
    assert json.loads(capsys.readouterr().out)["completed"] == 1
    assert made[0].dtype == "float32"
    assert main(command) == OutputError.exit_code, "the output exists"


def test_another_run_is_refused_before_its_model_is_loaded(tmp_path, tokenizer, monkeypatch, capsys):
    from moe_prefill.cli import main

    monkeypatch.setattr(runbatch, "_CHUNK_LINES", 1)
    monkeypatch.setattr("moe_prefill.workers.build_scoring", lambda config: made.append(config) or engine)
    made, engine = [], StoppingEngine(1, vocab_size=tokenizer.vocab_size, max_sweep=4096)
    source = tmp_path / "in.jsonl"
    source.write_text(line("a", {"prompt": "a", "max_tokens": 1}) + "\n" + line("b", {"prompt": "b", "max_tokens": 1}))
    command = ["run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", str(MODEL)]
    assert main(command) == 70
    for options, told in (
        (["--dtype", "float32"], 'engine.dtype: "bfloat16" there, "float32" now'),
        (["--max-sweep-tokens", "64"], "engine.max_sweep_tokens: 4096 there, 64 now"),
        (["--max-logprobs", "3"], "server.max_logprobs: 20 there, 3 now"),
    ):
        assert main([*command, "--resume", *options]) == OutputError.exit_code
        assert told in capsys.readouterr().err
    assert len(made) == 1, "the model was loaded"
    engine.left = -1
    assert main([*command, "--resume"]) == 0
    assert made[1].max_sweep_tokens == 4096, "the size that the run began with"


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
