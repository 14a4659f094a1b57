"""Chunks side by side on the cores of a CPU: the same answers, every time, and errors that are not lost."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.engine import build_engine
from moe_prefill.engine.cores import ManyCores, OneByOne
from moe_prefill.engine.plan import rows_of_chunk
from moe_prefill.models import preset, spec_from_hf

MODEL = Path(__file__).resolve().parents[2] / "examples/demo_model/checkpoint"


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    yield
    torch.set_num_threads(1)


def logits(threads: int, dtype: str, sharing: str) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    stem = random.integers(0, 8192, 300)
    tails = [random.integers(0, 8192, n) for n in (1, 40, 700, 900, 3, 1200)]
    requests = [AtomicRequest.candidates(np.concatenate([stem, tail]), np.arange(50)) for tail in tails]
    engine = build_engine(EngineConfig(model=str(MODEL), device="cpu", threads=threads, dtype=dtype, sharing=sharing))
    try:
        first, again = ([result.logits for result in engine.score(requests)] for _ in range(2))
    finally:
        engine.close()
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    return first


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.06)])
@pytest.mark.parametrize("sharing", ["off", "force"])
def test_cores_change_no_answer(dtype, tolerance, sharing):
    for alone, beside in zip(logits(1, dtype, sharing), logits(3, dtype, sharing), strict=True):
        assert np.abs(alone - beside).max() <= tolerance * np.abs(alone).max()


@pytest.mark.parametrize("cores", [OneByOne(), ManyCores(2)])
def test_every_item_is_computed_once_in_the_callers_mode(cores):
    seen = []
    with torch.inference_mode():
        cores.each(lambda item: seen.append((item, torch.is_inference_mode_enabled())), range(20))
    assert sorted(seen) == [(item, True) for item in range(20)]
    cores.each(lambda item: seen.append((item, torch.is_inference_mode_enabled())), [20, 21])
    assert sorted(seen[20:]) == [(20, False), (21, False)]
    cores.close()


def test_an_error_reaches_the_caller_and_threads_come_back():
    torch.set_num_threads(2)
    cores = ManyCores(2)

    def work(item: int) -> None:
        assert torch.get_num_threads() == 1
        if item == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        cores.each(work, range(6))
    assert torch.get_num_threads() == 2
    cores.close()


def test_chunks_for_cores_keep_enough_rows_for_an_expert():
    spec = spec_from_hf(preset("Qwen3-30B-A3B"))  # 8 of 128 experts: 1024 rows give 64 an expert
    assert rows_of_chunk(spec, 4096, 100_000, cores=1) == 4096
    assert rows_of_chunk(spec, 4096, 100_000, cores=2) == 2000  # 25 rounds on both cores, at most 2048 rows each
    assert rows_of_chunk(spec, 4096, 100_000, cores=64) == 1024
    assert rows_of_chunk(spec, 500, 100_000, cores=64) == 500
    assert rows_of_chunk(spec, 4096, 3000, cores=2) == 1500
