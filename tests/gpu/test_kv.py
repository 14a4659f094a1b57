"""Prefixes from the pool on a GPU: the same answers, no wait for the host inside a sweep, and slots that are read
before a later sweep writes them again.
"""

import numpy as np
import pytest
import torch

from moe_prefill.blocks import HashedSweep
from moe_prefill.engine.sweep import run_sweep
from tests.engine.test_kv import asking, assert_same, question, random_tokens
from tests.gpu.test_engine import gpu_engine
from tests.reference import FAMILIES, convert, random_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_answers_behind_a_hit_are_those_without_a_pool(family, seed):
    converted = convert(random_model(family, seed))
    plain = gpu_engine(converted)
    document = random_tokens(200, seed)
    for sharing in ("off", "auto", "force"):
        engine = gpu_engine(converted, sharing=sharing, kv_blocks=60)
        for keep in (200, 150, 33, 200):
            requests = [question(document[:keep], tail) for tail in range(5)]
            requests.append(asking(document[:keep], [keep // 2, keep - 1]))
            assert_same(engine.score(requests), plain.score(requests), (family, seed, sharing, keep))
        is_private = engine.forming.private_beyond is not None and engine.forming.private_beyond < 200
        assert engine.stats.pooled_tokens > 0 or is_private


def test_bfloat16_answers_are_no_further_from_float32_ones():
    converted = convert(random_model("qwen3_moe", 2))
    documents = [random_tokens(200, 1, index) for index in range(40)]
    requests = [question(document, tail) for document in documents for tail in range(8)]
    exact = gpu_engine(converted).score(requests)
    plain = gpu_engine(converted, torch.bfloat16, sharing="off").score(requests)
    engine = gpu_engine(converted, torch.bfloat16, kv_blocks=1000)
    engine.score(requests)
    pooled = engine.score(requests)
    assert engine.stats.pooled_tokens > 40 * 190

    def error(found):
        return np.median(
            [np.abs(a.logprobs(r) - b.logprobs(r)) for a, b, r in zip(found, exact, requests, strict=True)]
        )

    assert error(pooled) <= 1.2 * error(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_with_hits_and_new_blocks_never_waits_for_the_host(dtype):
    engine = gpu_engine(convert(random_model("qwen3_moe", 5)), dtype, kv_blocks=40)
    document = random_tokens(160, 3)
    requests = [question(document, tail) for tail in range(6)]
    engine.score([question(document[:100], 1)])
    pool = engine._pool
    blocks = pool.take(requests)
    assert blocks.held.tolist() == [96] * 6
    assert len(blocks.new) == 4
    plan = engine._plan(requests, blocks)
    results = []
    with torch.inference_mode():
        run_sweep(plan, engine._decoder, engine._weights, engine._banks, pool=pool.tensors)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                out = run_sweep(plan, engine._decoder, engine._weights, engine._banks, pool=pool.tensors)
                results.append(out.vocabulary.logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_slots_are_read_before_they_are_written_again():
    """Each sweep evicts what the one before it, enqueued just ahead, still reads."""
    converted = convert(random_model("qwen3_moe", 5))
    engine, plain = gpu_engine(converted, kv_blocks=12), gpu_engine(converted)
    documents = [random_tokens(160, 4, index) for index in range(2)]
    sweeps = [[question(documents[index // 2 % 2], tail) for tail in range(index, index + 2)] for index in range(12)]
    hashed = [
        HashedSweep(s, [tuple(f"{i // 2 % 2} {b}".encode() for b in range(10))] * 2, [10, 10])
        for i, s in enumerate(sweeps)
    ]
    for results, requests in zip(engine.compute(hashed), sweeps, strict=True):
        assert_same(results, plain.score(requests))
    assert engine.stats.pooled_tokens >= 6 * 100
