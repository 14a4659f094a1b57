"""Workers that die under load, and clients that do not read."""

import asyncio
import json
import signal
import sys
import tempfile
import threading
import time

import httpx
import numpy as np
import pytest

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.server.app import SlowReaders
from moe_prefill.server.fairqueue import make_work
from moe_prefill.server.scheduler import Policy, Scheduler
from moe_prefill.workers import GroupEngine, RoutedEngine, Routing, group
from tests.workers.fake_worker import answer
from tests.workers.helpers import harm, workers

from .batches import ended, line, sdk, served, start
from .conftest import MODEL, ROOT
from .helpers import listening, running


@pytest.fixture
def fake_workers(monkeypatch, tmp_path):
    """Configs of engines whose workers only pretend to compute."""
    monkeypatch.setattr(group, "WORKER", "tests.workers.fake_worker")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return lambda gpus, **facts: EngineConfig(model=json.dumps(facts), gpus=gpus, device="cpu")


@pytest.fixture(params=[GroupEngine, RoutedEngine])
def group_engine(request, fake_workers):
    engine = request.param(fake_workers(2, layer_s=0.001))
    yield engine
    engine.close()


def test_workers_killed_under_load_lose_and_double_nothing(group_engine):
    scheduler = Scheduler(group_engine, Policy(max_queue_tokens=10**6, max_wait_s=0))
    scheduler.start()
    wrong, replies = [], []

    def client(seed):
        draw = np.random.default_rng(seed)
        for _ in range(12):
            asked = [AtomicRequest.candidates(draw.integers(0, 900, draw.integers(1, 40)), [1, 2]) for _ in range(6)]
            work, places = make_work(asked)
            work.reply.add_done_callback(replies.append)
            scheduler.submit(work)
            answers = work.reply.result(60)
            for place, want in zip(places, asked, strict=True):
                if answers[place].logits.tobytes() != answer(want).logits.tobytes():
                    wrong.append(want)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        seen = group_engine.stats.sweeps
        while group_engine.stats.sweeps == seen and any(thread.is_alive() for thread in threads):
            time.sleep(0.002)
        for pid in workers()[:1]:
            harm(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    scheduler.close()
    assert not wrong
    assert len(replies) == 72
    assert group_engine.stats.restarts >= 1


def test_a_client_that_leaves_takes_what_waits_at_a_worker_with_it(fake_workers, make_service):
    """Its rows were routed and their sweep had not begun. Those beside them are answered."""
    engine = RoutedEngine(fake_workers(1), Routing(policy="round-robin"))
    load = engine._routes.frontend.workers[0].load
    (worker,) = workers()

    async def until(true, *asked):
        while not true():
            assert not any(one.done() for one in asked)
            await asyncio.sleep(0.005)

    def body(rows):
        return {"query": [1], "items": rows, "label_token_ids": [1, 2], "apply_softmax": True}

    async def go(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            harm(worker, signal.SIGSTOP)
            first = asyncio.ensure_future(http.post("/v1/score", json=body([[7] * 60])))
            await until(lambda: load.running == 1, first)
            leaves = asyncio.ensure_future(http.post("/v1/score", json=body([[n, n] * 15 for n in range(40)])))
            await until(lambda: load.waiting == 40, first, leaves)
            leaves.cancel()
            await until(lambda: load.waiting == 0, first)
            harm(worker, signal.SIGCONT)
            assert (await first).status_code == 200
            return await http.post("/v1/score", json=body([[9, 9]]))

    service = make_service(engine, max_queue_tokens=10**4)
    service.scheduler.pace.call_tokens = 1e4  # all rows in one call
    try:
        with listening(service) as url:
            reply = asyncio.run(go(url))
    finally:
        harm(worker, signal.SIGCONT)
        engine.close()
    assert reply.status_code == 200
    assert (load.flops, load.waiting, load.running) == (0, 0, 0)
    assert engine.stats.requests == 2, "the rows of who left were not computed"


def test_a_client_that_does_not_take_its_reply_is_let_go():
    async def reply(scope, receive, send):
        await send({"type": "http.response.body", "body": b"x"})

    async def full(message):
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):  # the server closes the connection then
        asyncio.run(SlowReaders(reply, 0.01)({"type": "http"}, None, full))


def test_what_sqlite_has_no_room_for_is_refused_and_nothing_is_lost(tmp_path, make_service):
    async def go():
        async with served(tmp_path / "data", make_service()) as http:
            client = sdk(http)
            first = await start(client, [line(1)])
            await ended(client, first.id)
            store = http.store
            (pages,) = store._db.execute("PRAGMA page_count").fetchone()
            store._db.execute(f"PRAGMA max_page_count = {pages}")
            refused = []
            for number in range(200):
                reply = await http.post("/v1/files", files={"file": line(number).encode()}, data={"purpose": "batch"})
                if reply.status_code != 200:
                    refused.append(reply)
                    break
            assert refused[0].status_code == 507
            assert refused[0].json()["error"]["code"] == "disk_full"
            assert str(tmp_path) not in refused[0].text
            known = len(await asyncio.to_thread(store.files, ""))
            assert len(list((tmp_path / "data/files").iterdir())) == known, "nothing of what was refused is left"
            store._db.execute("PRAGMA max_page_count = 100000")
            assert (await ended(client, (await start(client, [line(2)])).id)).status == "completed"

    asyncio.run(go())


def test_every_request_inside_at_sigterm_gets_one_reply(tmp_path):
    """The whole server as a process, with more requests inside than it has the time to serve."""
    command = [sys.executable, "-m", "moe_prefill.cli", "serve", "--model", str(MODEL), "--port", "0", "--threads", "1"]
    command += ["--served-model-name", "demo", "--warmup", "off", "--drain-seconds", "0.3", "--max-sweep-s", "0.2"]
    count = 150

    async def load(url, process):
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            bodies = [{"prompt": [[number % 200 + 5] * 300], "max_tokens": 1} for number in range(count)]
            asked = [asyncio.ensure_future(http.post("/v1/completions", json=body)) for body in bodies]
            while not any(one.done() for one in asked):
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked)

    with running(command, tmp_path) as (process, url):
        replies = asyncio.run(load(url, process))
        assert process.wait(60) == 0
    assert len(replies) == count
    assert {reply.status_code for reply in replies} == {200, 503}
    assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 503)
