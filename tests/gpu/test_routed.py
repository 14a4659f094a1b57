"""The frontend over worker processes on a GPU: the answers of one engine, also in rounds and through a loss."""

from dataclasses import replace

import pytest

from moe_prefill.engine import build_engine
from moe_prefill.workers import RoutedEngine, Routing
from tests.gpu.test_workers import CONFIG, REQUESTS
from tests.workers.helpers import harm_later, wait_for, workers
from tests.workers.test_routed_real import check_close

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def expected():
    engine = build_engine(replace(CONFIG, dtype="float32"))
    answers = engine.score(REQUESTS)
    engine.close()
    return answers


@pytest.mark.parametrize("kv_gib", [0.0, 0.25])
@pytest.mark.parametrize("residency", ["resident", "sharded", "hybrid"])
def test_two_routed_workers_on_one_gpu_one_of_them_killed(expected, residency, kv_gib):
    config = replace(CONFIG, dtype="float32", gpus=2, residency=residency, kv_gib=kv_gib)
    engine = RoutedEngine(config, Routing(max_wait_s=0.002))
    assert engine.plan.schedule == ("rounds" if residency == "hybrid" else "free")
    harm_later(engine, 1, sweeps=3)
    replies = [reply for request in REQUESTS for reply in engine.submit([request])]  # one by one
    check_close([reply.result(120) for reply in replies], expected)
    assert wait_for(lambda: engine.stats.restarts == 1, 120)
    check_close(engine.score(REQUESTS), expected)  # all at once, prefixes kept
    assert (engine.stats.pooled_tokens > 0) == (kv_gib > 0)
    assert not any(worker.table.oddities for worker in engine._routes.frontend.workers)
    print(f"{residency}, {kv_gib} GiB: pace {engine.pace:.2f}, T {engine.machine.limits.saturated:.3g} FLOPs")
    engine.close()
    assert workers() == []
