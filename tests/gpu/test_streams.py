"""Expert streams on a GPU: the bits of resident banks, waits that a hostile transport cannot slip past, and no word to
the host inside a sweep.
"""

import pytest
import torch

from moe_prefill.engine.sweep import run_sweep
from tests.experts.faults import ChaosTransport
from tests.experts.helpers import (
    FOUR_LAYERS,
    all_levels,
    cycled_levels,
    engine_on,
    filled_memory,
    model_of,
    requests_of,
    resident_on,
    scores,
    wrapped,
)
from tests.reference import FAMILIES

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


def keep_busy() -> None:
    """Some milliseconds of work on the compute stream, so that copies run far ahead of what reads them."""
    torch.cuda._sleep(20_000_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_equals_resident(family, dtype):
    converted = model_of(family, 3, dtype)
    requests = requests_of(3)
    expected = scores(engine_on(DEVICE, converted, resident_on(DEVICE, converted), sharing="force"), requests)
    for levels, depth in (
        (all_levels(converted.spec, "offloaded"), 1),
        (all_levels(converted.spec, "offloaded"), 2),
        (cycled_levels(converted.spec, ["resident", "offloaded"]), 3),
    ):
        source = filled_memory(converted, levels, buffers=depth, device=DEVICE, slice_bytes=4096).source()
        engine = engine_on(DEVICE, converted, source, sharing="force")
        for _ in range(3):
            keep_busy()
            assert torch.equal(scores(engine, requests), expected), (levels, depth)
        engine.close()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chaos_changes_nothing(depth):
    converted = model_of("olmoe", FOUR_LAYERS, torch.bfloat16)
    requests = requests_of(5)
    expected = scores(engine_on(DEVICE, converted, resident_on(DEVICE, converted)), requests)
    memory = filled_memory(converted, all_levels(converted.spec, "offloaded"), buffers=depth, device=DEVICE)
    engine = engine_on(DEVICE, converted, wrapped(memory, lambda inner: ChaosTransport(inner, 1)).source())
    for _ in range(5):
        assert torch.equal(scores(engine, requests), expected)
    engine.close()


def test_the_same_chaos_shows_a_missing_wait():
    converted = model_of("olmoe", FOUR_LAYERS, torch.bfloat16)
    requests = requests_of(5)
    expected = scores(engine_on(DEVICE, converted, resident_on(DEVICE, converted)), requests)
    memory = filled_memory(converted, all_levels(converted.spec, "offloaded"), device=DEVICE)
    source = wrapped(memory, lambda inner: ChaosTransport(inner, 1, longest_s=0.05)).source()
    source.take_stats = list  # its marks are not done when the sweep is
    source._lane.compute_wait = lambda mark: (source._lane.compute_mark(), source._lane.compute_mark())
    assert not torch.equal(scores(engine_on(DEVICE, converted, source), requests), expected)
    source.close()


def test_a_streamed_sweep_never_waits_for_the_host_and_says_what_it_cost():
    converted = model_of("olmoe", FOUR_LAYERS, torch.bfloat16)
    memory = filled_memory(converted, all_levels(converted.spec, "offloaded"), device=DEVICE)
    bank, source = memory._setup.layout.bank_bytes, memory.source()
    engine = engine_on(DEVICE, converted, source)
    requests = requests_of(6, count=20)
    plan = engine.plan(requests)
    with torch.inference_mode():
        run_sweep(plan, engine._decoder, engine._weights, source)  # kernels compile here
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [run_sweep(plan, engine._decoder, engine._weights, source) for _ in range(10)]
            taken = source.take_stats()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    logits = [result.vocabulary.logits for result in results]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    torch.cuda.synchronize()
    stats = (taken + source.take_stats())[-1]
    assert stats.bytes_by_link == {"host": 4 * bank}
    assert 0 <= stats.exposed_first_ms <= stats.exposed_ms <= stats.sweep_ms
    assert all(layer.copy_begin_ms < layer.copy_end_ms for layer in stats.layers)
    assert all(layer.compute_begin_ms <= layer.compute_end_ms for layer in stats.layers)
    engine.close()


def test_host_pools_are_pinned_and_given_back():
    converted = model_of("olmoe", FOUR_LAYERS)
    memory = filled_memory(converted, all_levels(converted.spec, "offloaded"), device=DEVICE)
    places = [memory._transports["offloaded"].place(layer) for layer in range(4)]
    assert all(place.is_pinned() for place in places)
    memory.source().close()
    assert not any(place.is_pinned() for place in places)
