"""Worker processes on a GPU: two of them on one, bit for bit the answers of one engine, through the loss of one."""

import signal
from dataclasses import replace

import pytest
import torch

from moe_prefill.config import EngineConfig
from moe_prefill.engine import build_engine
from moe_prefill.engine.progress import LayerCounter
from moe_prefill.workers import GroupEngine, Patience
from moe_prefill.workers.page import ProgressPage
from tests.workers.helpers import harm_later, wait_for, workers
from tests.workers.test_real_engine import DEMO, equal, requests_of

pytestmark = pytest.mark.gpu
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
CONFIG = EngineConfig(
    model=str(DEMO / "checkpoint"), device="cuda:0", memory_gib=8, host_gib=8, max_sweep_tokens=512, chunk_rows=512
)
REQUESTS = requests_of(0, 8000, 120, 400)


@pytest.fixture(scope="module")
def expected():
    engine = build_engine(CONFIG)
    answers = engine.score(REQUESTS)
    engine.close()
    return answers


def check(config: EngineConfig, expected, number: int) -> None:
    """Score while one worker is harmed in the middle."""
    engine = GroupEngine(config, Patience(layer_s=5))
    harm_later(engine, 1, sweeps=5, number=number)
    assert all(equal(a, b) for a, b in zip(expected, engine.score(REQUESTS), strict=True))
    assert wait_for(lambda: engine.stats.restarts == 1, 120)
    print(f"{config.residency}: back after {engine.stats.recovery_s:.1f} s")
    engine.close()
    assert workers() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("residency", ["resident", "sharded", "hybrid"])
def test_two_workers_on_one_gpu(expected, residency, number):
    check(replace(CONFIG, gpus=2, residency=residency), expected, number)


@needs_two
@pytest.mark.parametrize("residency", ["resident", "sharded", "hybrid"])
@pytest.mark.parametrize("transport", ["copy-engine", "nccl"])
def test_two_workers_on_two_gpus(expected, residency, transport):
    check(replace(CONFIG, device="cuda", gpus=2, residency=residency, transport=transport), expected, signal.SIGKILL)


def test_layers_are_counted_when_they_are_done_and_nobody_waits():
    page = ProgressPage.create(3)
    counter = LayerCounter(page.counts[1:2], torch.device("cuda", 0))
    with torch.inference_mode():
        counter()
    torch.cuda.synchronize()
    assert page.read() == [0, 1, 0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second of work in front
        counter()
        counter()
        assert page.read() == [0, 1, 0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert page.read() == [0, 3, 0]
