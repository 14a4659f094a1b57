"""Float8 experts through the engine: loaded straight into quantised places, the same wherever the banks live."""

from pathlib import Path

import numpy as np
import pytest

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.engine import build_engine

MODEL = Path(__file__).resolve().parents[2] / "examples/demo_model/checkpoint"


def logits(**settings):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 200, 40)
    requests = [AtomicRequest.candidates(random.integers(0, 8192, n), np.arange(64), vocabulary=True) for n in lengths]
    engine = build_engine(EngineConfig(model=str(MODEL), device="cpu", threads=1, **settings))
    try:
        results = engine.score(requests)
        return np.stack([result.logprobs(request) for result, request in zip(results, requests, strict=True)])
    finally:
        engine.close()


@pytest.fixture(scope="module")
def resident():
    return logits(dtype="float32", quantization="fp8", residency="resident")


def test_float8_is_close_to_float32_and_not_it(resident):
    difference = np.abs(resident - logits(dtype="float32"))
    assert 0 < np.median(difference) < 0.13
    assert np.quantile(difference, 0.99) < 0.8


@pytest.mark.parametrize("residency", ["offloaded", "resident:3,offloaded:3"])
def test_float8_banks_stream_with_their_scales(resident, residency):
    streamed = logits(dtype="float32", quantization="fp8", residency=residency)
    assert np.array_equal(streamed, resident)
