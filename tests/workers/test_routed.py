"""Requests through the frontend to workers that only pretend to compute."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest, AtomicResult
from moe_prefill.errors import Overloaded, PlanError, RowError, UsageError, WorkerError
from moe_prefill.frontend import POLICIES
from moe_prefill.workers import Patience, RoutedEngine, Routing
from moe_prefill.workers.routed import Reply
from tests.workers.fake_worker import answer
from tests.workers.helpers import harm, wait_for, workers

POISON = 999
pytestmark = pytest.mark.usefixtures("fake_workers")


def engine_of(size: int, routing: Routing | None = None, patience: Patience | None = None, **facts) -> RoutedEngine:
    config = EngineConfig(model=json.dumps(facts), gpus=size, device="cpu")
    return RoutedEngine(config, routing or Routing(), patience or Patience())


def requests_of(seed: int, count: int = 60) -> list[AtomicRequest]:
    """Half of them in families that share 32 tokens."""
    r = np.random.default_rng(seed)
    prefixes = r.integers(0, 900, (3, 32))
    made = []
    for index in range(count):
        tokens = r.integers(0, 900, r.integers(1, 30))
        tokens = np.concatenate([prefixes[index % 3], tokens]) if index % 2 else tokens
        made.append(AtomicRequest.candidates(tokens, r.integers(0, 900, 3)))
    return made


def check(requests: list[AtomicRequest], results: list) -> None:
    for request, result in zip(requests, results, strict=True):
        assert result.logits.tobytes() == answer(request).logits.tobytes()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_whatever_the_policy(policy):
    requests = requests_of(0)
    requests[7] = AtomicRequest.candidates(np.zeros(65), [1])
    requests[9] = AtomicRequest.candidates([1, 1000], [1])
    engine = engine_of(3, Routing(policy=policy), kv_blocks=8)
    results = engine.score(requests)
    assert [r.code for r in results if isinstance(r, RowError)] == ["too_long", "bad_token"]
    good = [i for i in range(len(requests)) if i not in (7, 9)]
    check([requests[i] for i in good], [results[i] for i in good])
    assert engine.stats.requests == len(good)
    assert engine.backlog_s() == 0
    assert engine.score([]) == []
    states = engine.worker_states()
    assert [(s.rank, s.alive, s.load_flops) for s in states] == [(rank, True, 0) for rank in range(3)]
    assert sum(s.stats.requests for s in states) == len(good)
    assert {s.saturation_flops for s in states} == {engine.machine.limits.saturated}
    assert all(sum(s.residency.values()) == len(engine.machine.streaming.levels) for s in states)
    engine.close()


@pytest.mark.parametrize("schedule", ["free", "rounds"])
def test_requests_that_come_one_by_one_from_many_threads(schedule):
    engine = engine_of(2, Routing(max_wait_s=0.002, max_sweep_s=1.0), schedule=schedule, layer_s=0.001)
    wrong: list[AtomicRequest] = []

    def client(seed: int) -> None:
        for request in requests_of(seed, 15):
            (reply,) = engine.submit([request])
            if reply.result(30).logits.tobytes() != answer(request).logits.tobytes() or reply.started_s is None:
                wrong.append(request)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert engine.stats.requests == 90
    engine.close()


def test_workers_killed_under_load_answer_every_request_once():
    chance = random.Random(0)
    engine = engine_of(3, patience=Patience(restarts=20), layer_s=0.01, kv_blocks=8)
    requests = [request for seed in range(4) for request in requests_of(seed)]
    told: list[int] = []
    replies = engine.submit(requests, patient=True)
    for index, reply in enumerate(replies):
        reply.add_done_callback(lambda _, index=index: told.append(index))
    for _ in range(2):
        seen = engine.stats.sweeps
        assert wait_for(lambda seen=seen: engine.stats.sweeps > seen)
        assert wait_for(lambda: len(workers()) == 3)
        harm(chance.choice(workers()), signal.SIGKILL)
    check(requests, [reply.result(60) for reply in replies])
    assert sorted(told) == list(range(len(requests)))
    assert engine.stats.requests == len(requests)
    assert engine.stats.restarts >= 1
    assert all(not w.table.oddities for w in engine._routes.frontend.workers), "events of an earlier life are not used"
    engine.close()


def test_tables_are_audited_when_all_is_idle(caplog):
    engine = engine_of(2, kv_blocks=64)
    audits: list[list[str]] = []
    audited = engine._routes.audited
    engine._routes.audited = lambda rank, state: audits.append(audited(rank, state)) or audits[-1]
    engine.score(requests_of(1))
    assert wait_for(lambda: len(audits) >= 2)
    assert not any(audits)
    assert any(len(w.table.committed) for w in engine._routes.frontend.workers)
    engine._routes.frontend.workers[0].table.committed.clear()  # as if events had gone wrong
    engine.score(requests_of(2))
    assert wait_for(lambda: any(audits))
    engine.score(requests_of(3))
    assert wait_for(lambda: len(audits) >= 6)
    assert not any(audits[-2:]), "the snapshot has put it right"
    engine.close()


def test_a_full_queue_refuses_and_says_when_to_come_back():
    engine = engine_of(1, Routing(policy="paper", max_queued=4), layer_s=0.02)
    replies = engine.submit(requests_of(0, 300))
    errors = [reply.exception(60) for reply in replies]
    refused = [error for error in errors if error is not None]
    assert refused
    assert all(isinstance(error, Overloaded) and error.retry_after_s > 0 for error in refused)
    assert sum(error is None for error in errors) == engine.stats.requests >= 4
    check(requests_of(1, 100), engine.score(requests_of(1, 100)))
    engine.close()


def test_what_is_cancelled_is_not_computed():
    engine = engine_of(1, layer_s=0.05)
    requests = requests_of(0, 100)
    replies = engine.submit(requests)
    assert wait_for(lambda: any(reply.started_s for reply in replies))
    assert not next(reply for reply in replies if reply.started_s).cancel(), "its sweep runs"
    cancelled = [reply for reply in replies[50:] if reply.cancel()]
    assert cancelled
    check(
        [request for request, reply in zip(requests, replies, strict=True) if not reply.cancelled()],
        [reply.result(60) for reply in replies if not reply.cancelled()],
    )
    assert wait_for(lambda: engine._idle)
    assert engine.stats.requests < len(requests)
    load = engine._routes.frontend.workers[0].load
    assert (load.flops, load.ns, load.tokens, load.waiting, load.running) == (0, 0, 0, 0, 0)
    engine.close()


def test_what_waits_at_a_worker_is_withdrawn_with_its_bookkeeping():
    engine = engine_of(1, Routing(policy="round-robin"), kv_blocks=8)
    worker = engine._routes.frontend.workers[0]
    harm(workers()[0], signal.SIGSTOP)
    (first,) = engine.submit([AtomicRequest.candidates(np.arange(60), [1])])
    assert wait_for(lambda: first.started_s)

    def books():
        return worker.load.flops, worker.load.ns, worker.load.tokens, worker.load.waiting, dict(worker.table.pending)

    before = books()
    replies = engine.submit(requests_of(0, 40))
    assert wait_for(lambda: worker.load.waiting == 40)
    assert worker.table.pending != before[4], "they have promised their blocks"
    assert all(reply.cancel() for reply in replies)
    assert wait_for(lambda: books() == before)
    harm(workers()[0], signal.SIGCONT)
    first.result(20)
    (after,) = engine.submit([AtomicRequest.candidates([3], [1])])
    after.result(20)
    assert wait_for(lambda: engine._idle)
    assert (worker.load.flops, worker.load.ns, worker.load.tokens) == (0, 0, 0)
    assert not worker.table.pending
    assert engine.stats.requests == 2
    engine.close()


def test_who_left_during_a_sweep_is_not_computed_a_second_time():
    engine = engine_of(1)
    given = requests_of(0, 2)
    harm(workers()[0], signal.SIGSTOP)
    gone, stays = engine.submit(given)
    assert wait_for(lambda: gone.started_s and stays.started_s)
    assert not gone.cancel()
    harm(workers()[0], signal.SIGKILL)
    with pytest.raises(CancelledError):
        gone.result(20)
    check(given[1:], [stays.result(20)])
    assert wait_for(lambda: engine._idle)
    assert (engine.stats.requests, engine.stats.restarts) == (1, 1)
    engine.close()


@pytest.mark.parametrize("seed", range(3))
def test_with_clients_that_leave_and_workers_that_die_every_request_has_one_end(seed):
    chance = random.Random(seed)
    engine = engine_of(2, Routing(policy=chance.choice(POLICIES)), Patience(restarts=20), layer_s=0.003, kv_blocks=8)
    told: list[int] = []
    asked: list[tuple[AtomicRequest, Reply]] = []
    for step in range(12):
        made = requests_of(100 * seed + step, 20)
        asked += zip(made, engine.submit(made, patient=True), strict=True)
        for number, (_, reply) in enumerate(asked[-len(made) :], len(asked) - len(made)):
            reply.add_done_callback(lambda _, number=number: told.append(number))
        for _, reply in chance.sample(asked, len(asked) // 4):
            reply.cancel()
        if step in (3, 8) and workers():
            harm(chance.choice(workers()), signal.SIGKILL)
        time.sleep(0.01)
    ends = [(request, reply, _end(reply)) for request, reply in asked]
    assert sorted(told) == list(range(len(asked)))
    assert all(reply.unwanted for _, reply, end in ends if end is None)
    kept = [(request, end) for request, _, end in ends if end is not None]
    check([request for request, _ in kept], [end for _, end in kept])
    assert wait_for(lambda: engine._idle)
    assert len(kept) <= engine.stats.requests < len(asked)
    for worker in engine._routes.frontend.workers:
        load = worker.load
        assert (load.flops, load.ns, load.tokens, load.waiting, load.running) == (0, 0, 0, 0, 0)
        assert not worker.table.pending
    engine.close()


def _end(reply: Reply) -> AtomicResult | None:
    try:
        return reply.result(60)
    except CancelledError:
        return None


def test_less_than_t_waits_and_then_goes():
    engine = engine_of(1, Routing(max_wait_s=0.2))
    assert engine.machine.limits.saturated > 0
    begun = time.monotonic()
    (reply,) = engine.submit([AtomicRequest.candidates([1], [1])])
    reply.result(10)
    assert time.monotonic() - begun >= 0.2
    engine.close()


def test_t_follows_what_the_workers_wait(caplog):
    engine = engine_of(1, exposed=0.2, layer_s=0.0005, flops=10**10)
    planned = engine.machine.limits.saturated
    engine._routes.threshold.most = 1 << 60
    with caplog.at_level("WARNING"):
        engine.score(requests_of(0, 60))
    engine.close()
    assert engine._routes.threshold.flops > planned
    assert engine._routes.frontend.bounds.least_flops == engine._routes.threshold.flops
    assert "T rises from" in caplog.text


def test_a_request_that_kills_its_worker_is_answered_with_an_error():
    engine = engine_of(2, patience=Patience(restarts=2), poison=POISON)
    (reply,) = engine.submit([AtomicRequest.candidates([1, POISON], [1])])
    assert isinstance(reply.exception(60), WorkerError)
    (late,) = engine.submit([AtomicRequest.candidates([1], [1])])
    assert isinstance(late.exception(10), WorkerError)
    with pytest.raises(WorkerError):
        engine.score([AtomicRequest.candidates([1], [1])])
    engine.close()


def test_the_end_answers_who_still_waits():
    engine = engine_of(1, layer_s=0.2)
    replies = engine.submit(requests_of(0, 50))
    engine.close()
    assert any(isinstance(reply.exception(1), WorkerError) for reply in replies)
    (late,) = engine.submit(requests_of(0, 1))
    assert isinstance(late.exception(1), WorkerError)


def test_what_cannot_be_routed_is_refused():
    with pytest.raises(UsageError, match="must be one of ours, paper"):
        Routing(policy="best")
    with pytest.raises(UsageError, match="nothing to route"):
        engine_of(2, schedule="together")
    with pytest.raises(PlanError):
        engine_of(2, fail="PlanError")
