"""The group of workers over engines that only pretend: who computes what, and every way of losing a worker."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.errors import ModelError, PlanError, RowError, WorkerError
from moe_prefill.workers import GroupEngine, Patience, group
from tests.workers.fake_worker import FORMING, answer
from tests.workers.helpers import harm, is_alive, wait_for, workers

SEEDS = 12 if os.environ.get("MOE_PREFILL_LONG") else 2
POISON = 999
pytestmark = pytest.mark.usefixtures("fake_workers")


def engine_of(size: int, patience: Patience | None = None, **facts: Any) -> GroupEngine:
    return GroupEngine(EngineConfig(model=json.dumps(facts), gpus=size, device="cpu"), patience or Patience())


def requests_of(seed: int, count: int = 60) -> list[AtomicRequest]:
    r = np.random.default_rng(seed)
    return [
        AtomicRequest.candidates(r.integers(0, 900, r.integers(1, 40)), r.integers(0, 900, 3)) for _ in range(count)
    ]


def check(requests: list[AtomicRequest], results: list) -> None:
    for request, result in zip(requests, results, strict=True):
        assert result.logits.tobytes() == answer(request).logits.tobytes()


def num_sweeps(requests: list[AtomicRequest]) -> int:
    return sum(1 for _ in FORMING.sweeps(requests, range(len(requests))))


def test_every_request_is_answered_in_its_place():
    requests = requests_of(0)
    requests[7] = AtomicRequest.candidates(np.zeros(65), [1])
    requests[9] = AtomicRequest.candidates([1, 1000], [1])
    engine = engine_of(3)
    assert len(workers()) == 3
    results = engine.score(requests)
    assert [r.code for r in results if isinstance(r, RowError)] == ["too_long", "bad_token"]
    good = [i for i in range(len(requests)) if i not in (7, 9)]
    check([requests[i] for i in good], [results[i] for i in good])
    assert engine.stats.requests == len(good)
    assert engine.stats.sweeps == num_sweeps([requests[i] for i in good])
    assert engine.stats.busy_s > 0
    assert engine.peak_flops == 3e12
    assert engine.score([]) == []
    engine.close()


def score_while(engine: GroupEngine, lists: list[list[AtomicRequest]], harmful) -> None:
    """Score several lists in as many threads, with a fourth that does harm; every list is answered as ever."""
    results: dict[int, list] = {}

    def run(index: int) -> None:
        results[index] = engine.score(lists[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(lists))]
    for thread in threads:
        thread.start()
    harmful()
    for thread in threads:
        thread.join(60)
    for index, requests in enumerate(lists):
        check(requests, results[index])


def one_of_them(chance: random.Random) -> int:
    """A worker that runs. They are looked at once: while they are started again there is a moment without any."""
    found: list[int] = []
    assert wait_for(lambda: found.extend(workers()) or found)
    return chance.choice(found)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_workers_killed_at_random_moments_lose_and_double_nothing(seed):
    chance = random.Random(seed)
    engine = engine_of(3, Patience(restarts=20), layer_s=0.02)
    lists = [requests_of(10 * seed + i) for i in range(3)]

    def kill_some() -> None:
        for _ in range(3):
            time.sleep(chance.uniform(0, 0.5))  # from before the first sweep to the middle of a restart
            harm(one_of_them(chance), signal.SIGKILL)

    score_while(engine, lists, kill_some)
    assert engine.stats.requests == sum(map(len, lists))
    assert engine.stats.sweeps == sum(map(num_sweeps, lists))
    assert wait_for(lambda: engine.stats.restarts >= 1)
    assert engine.stats.recovery_s > 0
    engine.close()


def test_an_idle_worker_that_dies_is_replaced_at_once():
    engine = engine_of(2)
    first = workers()
    harm(first[1], signal.SIGKILL)
    assert wait_for(lambda: engine.stats.restarts == 1)
    assert not set(first) & set(workers())
    check(requests_of(2), engine.score(requests_of(2)))
    engine.close()


def test_a_worker_killed_while_it_starts():
    def kill_first() -> None:
        assert wait_for(workers)
        harm(workers()[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_first)
    thread.start()
    engine = engine_of(2)
    thread.join()
    check(requests_of(3), engine.score(requests_of(3)))
    engine.close()


def test_a_hanging_worker_is_given_up():
    engine = engine_of(2, Patience(layer_s=0.4), layer_s=0.01)

    def stop_one() -> None:
        assert wait_for(lambda: engine.stats.sweeps > 0)
        harm(workers()[1], signal.SIGSTOP)

    score_while(engine, [requests_of(4, 150)], stop_one)
    assert engine.stats.restarts == 1
    engine.close()


def test_a_worker_that_only_waits_does_not_hang():
    engine = engine_of(2, Patience(layer_s=0.2))
    time.sleep(0.6)
    check(requests_of(5), engine.score(requests_of(5)))
    assert engine.stats.restarts == 0
    engine.close()


def test_repeated_death_ends_with_one_error_for_everyone():
    engine = engine_of(2, Patience(restarts=1), poison=POISON)
    good = requests_of(6)
    check(good, engine.score(good))
    with pytest.raises(WorkerError, match=r"lost 2 times in a row .* exit code 9"):
        engine.score([*good, AtomicRequest.candidates([POISON], [1])])
    with pytest.raises(WorkerError, match="2 times in a row"):
        engine.score(good)
    assert workers() == []
    engine.close()


@pytest.mark.parametrize("kind", [PlanError, ModelError])
def test_an_error_while_building_is_the_same_error_here(kind):
    with pytest.raises(kind, match="of 2 refuses"):
        engine_of(2, fail=kind.__name__)


def test_a_bug_while_building_is_told_at_once():
    with pytest.raises(WorkerError, match=r"^worker 0 failed: AttributeError: .* 'NoSuchError'"):
        engine_of(1, fail="NoSuchError")


def test_a_worker_that_cannot_start_is_not_tried_for_ever(monkeypatch):
    monkeypatch.setattr(group, "WORKER", "tests.workers.no_such_module")
    with pytest.raises(WorkerError, match=r"lost 2 times in a row .* exit code 1"):
        engine_of(2, Patience(restarts=1))


def test_workers_that_take_too_long_to_start_are_given_up():
    with pytest.raises(WorkerError, match=r"\[0, 1\] are not ready after 1 s"):
        engine_of(2, Patience(start_s=1, restarts=0), build_s=60)


@pytest.mark.parametrize("schedule", ["rounds", "together"])
def test_schedules_in_which_ranks_need_one_another(schedule):
    engine = engine_of(3, schedule=schedule)
    for count in (0, 1, 7, 60):
        check(requests_of(7, count), engine.score(requests_of(7, count)))
    assert engine.stats.requests == 68
    engine.close()


CONTROLLER = """
import json, signal, sys, threading, time
from moe_prefill.config import EngineConfig
from moe_prefill.workers import GroupEngine, group
from tests.workers.helpers import workers
group.WORKER = "tests.workers.fake_worker"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and so a suite, may ignore it
def tell():
    while len(workers()) < 3:
        time.sleep(0.01)
    print(json.dumps(workers()), flush=True)
if sys.argv[1] != "{}":
    threading.Thread(target=tell).start()
engine = GroupEngine(EngineConfig(model=sys.argv[1], gpus=3, device="cpu"))
tell()
time.sleep(60)
"""


def start_controller(**facts: Any) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process with three workers, and their pids: once they are ready, or with any facts once they have begun."""
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, json.dumps(facts)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert controller.stdout is not None
    return controller, json.loads(controller.stdout.readline())


def test_no_worker_outlives_its_controller():
    controller, pids = start_controller()
    harm(pids[0], signal.SIGSTOP)  # one that cannot notice by itself
    controller.kill()
    controller.communicate()
    assert wait_for(lambda: not any(map(is_alive, pids)), 2.0), [pid for pid in pids if is_alive(pid)]


def test_ctrl_c_ends_the_workers_also_while_they_start():
    controller, pids = start_controller(build_s=60)
    controller.send_signal(signal.SIGINT)
    _, errors = controller.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    assert not any(map(is_alive, pids))
