"""Workers that die under load, and clients that do not read."""

import asyncio
import json
import signal
import tempfile
import threading
import time

import numpy as np
import pytest

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.server.app import SlowReaders
from moe_prefill.server.fairqueue import make_work
from moe_prefill.server.scheduler import Policy, Scheduler
from moe_prefill.workers import GroupEngine, group
from tests.workers.fake_worker import answer
from tests.workers.helpers import harm, workers

from .conftest import ROOT


@pytest.fixture
def group_engine(monkeypatch, tmp_path):
    monkeypatch.setattr(group, "WORKER", "tests.workers.fake_worker")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = GroupEngine(EngineConfig(model=json.dumps({"layer_s": 0.001}), gpus=2, device="cpu"))
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


def test_a_client_that_does_not_take_its_reply_is_let_go():
    async def reply(scope, receive, send):
        await send({"type": "http.response.body", "body": b"x"})

    async def full(message):
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):  # the server closes the connection then
        asyncio.run(SlowReaders(reply, 0.01)({"type": "http"}, None, full))
