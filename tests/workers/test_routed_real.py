"""Two processes over the demo model behind the frontend: the answers of the plain engine, whatever the policy."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from moe_prefill.blocks import BlockHasher
from moe_prefill.engine import build_engine
from moe_prefill.frontend import POLICIES, make_policy, make_ticket
from moe_prefill.simulate import simulate
from moe_prefill.workers import RoutedEngine, Routing
from moe_prefill.workloads import make_workload
from tests.workers.helpers import harm, wait_for, workers
from tests.workers.test_real_engine import DEMO, config_of, requests_of

SETTINGS = {"max_sweep_tokens": 512}


@pytest.fixture(scope="module")
def expected():
    """Requests with shared prefixes, and their answers by one engine in this process."""
    requests = requests_of(0, 8000, 120, 80)
    engine = build_engine(config_of(DEMO / "checkpoint", **SETTINGS))
    answers = engine.score(requests)
    engine.close()
    return requests, answers


def check_close(answers, expected) -> None:
    """Equal but for floating-point order: other requests are in the sweep."""
    for mine, theirs in zip(answers, expected, strict=True):
        for name in ("logits", "log_z", "top_logprobs"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            if a is not None and a.size:
                assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(b).max())


REAL = POLICIES if os.environ.get("MOE_PREFILL_LONG") else ("ours", "round-robin")  # the others: test_routed


@pytest.mark.parametrize(("policy", "kv_gib"), [*((policy, 0.0) for policy in REAL), ("ours", 0.01)])
def test_answers_are_those_of_the_plain_engine(expected, policy, kv_gib):
    requests, answers = expected
    engine = RoutedEngine(config_of(DEMO / "checkpoint", gpus=2, kv_gib=kv_gib, **SETTINGS), Routing(policy=policy))
    assert (engine.machine.kv_blocks > 0) == (kv_gib > 0)
    for _ in range(2 if kv_gib else 1):
        check_close(engine.score(requests), answers)
    stats = engine.stats
    assert stats.requests >= len(requests)
    assert (stats.pooled_tokens > 0) == (kv_gib > 0)
    assert not any(worker.table.oddities for worker in engine._routes.frontend.workers)
    engine.close()


def test_a_worker_killed_under_load_costs_time_and_no_answer(expected):
    requests, answers = expected
    engine = RoutedEngine(config_of(DEMO / "checkpoint", gpus=2, kv_gib=0.01, **SETTINGS))
    told: list[int] = []
    replies = engine.submit(requests)
    for index, reply in enumerate(replies):
        reply.add_done_callback(lambda _, index=index: told.append(index))
    assert wait_for(lambda: engine.stats.sweeps > 0)
    harm(workers()[-1], signal.SIGKILL)
    check_close([reply.result(60) for reply in replies], answers)
    assert sorted(told) == list(range(len(requests)))
    assert engine.stats.requests == len(requests)
    assert engine.stats.restarts == 1
    assert [worker.table.generation for worker in engine._routes.frontend.workers] == [1, 1]
    engine.close()
    assert workers() == []


def test_the_simulator_forms_the_sweeps_that_real_workers_compute():
    """Counts, not times: what is saved and how many sweeps it takes, on a few requests of the aggregated workload."""
    engine = RoutedEngine(config_of(DEMO / "checkpoint", gpus=2, kv_gib=0.0, max_sweep_tokens=2048))
    limits, machine = engine.limits, engine.machine
    workload = make_workload("aggregated", scale=0.0003).fitted(600, limits.vocab_size)
    assert all(not isinstance(answer, Exception) for answer in engine.score(workload.requests))
    stats = engine.stats
    engine.close()
    hasher = BlockHasher("simulated")
    tickets = [
        make_ticket(request, hasher, id=index, vocab_size=limits.vocab_size)
        for index, request in enumerate(workload.requests)
    ]
    outcome = simulate(tickets, machine, 2, make_policy("ours", machine.costs, machine.limits))
    assert outcome.prompt_tokens == stats.prompt_tokens == workload.num_tokens
    assert outcome.computed_tokens == pytest.approx(stats.computed_tokens, rel=0.1)
    assert abs(outcome.sweeps - stats.sweeps) <= 2
