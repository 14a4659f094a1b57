"""One device: banks from host memory give the very bits of resident ones, however deep the ring and slow the link."""

import os

import pytest
import torch

from moe_prefill.engine.sweep import run_without_tokens
from moe_prefill.experts import StreamedBanks
from tests.experts.faults import ChaosTransport, ThrottledTransport
from tests.experts.helpers import (
    FOUR_LAYERS,
    all_levels,
    cycled_levels,
    filled_memory,
    model_of,
    requests_of,
    scores,
    streamed_engine,
    wrapped,
)
from tests.reference import FAMILIES, engine_of

SEEDS = 12 if os.environ.get("MOE_PREFILL_LONG") else 3


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_equals_resident(family, seed):
    converted = model_of(family, seed)
    requests = requests_of(seed)
    options = {"sharing": "force", "max_sweep_tokens": 60, "chunk_rows": 16}  # several sweeps, several chunks
    expected = scores(engine_of(converted, **options), requests)
    for levels, depth in (
        (all_levels(converted.spec, "resident"), 2),
        (all_levels(converted.spec, "offloaded"), 1),
        (all_levels(converted.spec, "offloaded"), 2),
        (all_levels(converted.spec, "offloaded"), 3),
        (cycled_levels(converted.spec, ["resident", "offloaded"]), 2),
    ):
        engine = streamed_engine(converted, filled_memory(converted, levels, buffers=depth), **options)
        assert torch.equal(scores(engine, requests), expected), (levels, depth)
        assert torch.equal(scores(engine, requests), expected), "the second time"
        engine.close()


@pytest.fixture(scope="module")
def sparse():
    """Four sparse layers, and what they answer."""
    converted = model_of("olmoe", FOUR_LAYERS)
    assert converted.spec.num_sparse_layers == 4
    requests = requests_of(7)
    return converted, requests, scores(engine_of(converted, chunk_rows=8), requests)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chaos_changes_nothing(sparse, depth, seed):
    converted, requests, expected = sparse
    memory = filled_memory(converted, all_levels(converted.spec, "offloaded"), buffers=depth, slice_bytes=1000)
    engine = streamed_engine(converted, wrapped(memory, lambda inner: ChaosTransport(inner, seed)), chunk_rows=8)
    for _ in range(2):
        assert torch.equal(scores(engine, requests), expected)
    engine.close()


class _NeverWaitsForReady(StreamedBanks):
    def acquire(self, layer):
        slot = self._next_slot()
        now = self._lane.compute_mark()
        self._recorder.acquired(layer, now, now, None)
        return slot.bank


class _NeverWaitsForRelease(StreamedBanks):
    """Fetches one bank too early, into the buffer that is being read."""

    def acquire(self, layer):
        bank = super().acquire(layer)
        self._next_slot().free = self._lane.compute_mark()
        self._fetch_next()
        return bank

    def _fetch_ahead(self):
        while self._fetched < len(self._slots):
            self._fetch_next()


@pytest.mark.parametrize(("broken", "depth"), [(_NeverWaitsForReady, 2), (_NeverWaitsForRelease, 1)])
def test_the_same_chaos_shows_a_missing_wait(sparse, broken, depth):
    converted, requests, expected = sparse

    def shows(seed: int) -> bool:
        memory = filled_memory(converted, all_levels(converted.spec, "offloaded"), buffers=depth)
        source = wrapped(memory, lambda inner: ChaosTransport(inner, seed, longest_s=0.03)).source()
        source.__class__ = broken
        differs = not torch.equal(scores(engine_of(converted, banks=source, chunk_rows=8), requests), expected)
        source.close()
        return differs

    assert any(shows(seed) for seed in range(10))


def test_a_slow_link_is_waited_for_and_told(sparse):
    converted, requests, expected = sparse
    memory = filled_memory(converted, all_levels(converted.spec, "offloaded"), buffers=1)
    bank = memory._setup.layout.bank_bytes
    source = wrapped(memory, lambda inner: ThrottledTransport(inner, bank / 0.02)).source()
    engine = engine_of(converted, banks=source, chunk_rows=8)
    assert torch.equal(scores(engine, requests), expected)
    (stats,) = engine.transfers
    assert stats.bytes_by_link == {"host": 4 * bank}
    assert [layer.bytes_by_link for layer in stats.layers] == [{"host": bank}] * 4
    assert stats.exposed_ms == pytest.approx(sum(layer.wait_ms for layer in stats.layers))
    assert stats.exposed_first_ms == stats.layers[0].wait_ms
    for layer in stats.layers:  # one buffer: every bank's copy lies between two layers, and is waited for
        assert layer.copy_begin_ms < layer.copy_end_ms <= layer.compute_begin_ms < layer.compute_end_ms
        assert layer.copy_end_ms - layer.copy_begin_ms >= 20
        assert layer.wait_ms > 0
    assert stats.sweep_ms >= stats.exposed_ms
    source.close()


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_the_next_sweeps_first_banks_are_fetched_during_this_ones_last_layers(sparse, depth):
    converted, _, _ = sparse
    fetched = []

    class Recording(ThrottledTransport):
        def fetch(self, layer, buffer, lane):
            fetched.append(layer)
            return super().fetch(layer, buffer, lane)

    memory = filled_memory(converted, all_levels(converted.spec, "offloaded"), buffers=depth)
    source = wrapped(memory, lambda inner: Recording(inner, float("inf"))).source()
    assert fetched == []
    for sweep in range(1, 4):
        run_without_tokens(4, source)
        assert fetched == [number % 4 for number in range(4 * sweep + depth)]
    assert len(source.take_stats()) == 3
    source.close()


def test_an_interrupted_sweep_leaves_the_ring_in_order(sparse):
    converted, requests, expected = sparse
    source = filled_memory(converted, all_levels(converted.spec, "offloaded")).source()
    source.begin_sweep()
    for layer in range(2):
        source.acquire(layer)
        source.release(layer)
    source.acquire(2)  # an error here: neither released nor ended
    engine = engine_of(converted, banks=source, chunk_rows=8)
    assert torch.equal(scores(engine, requests), expected)
    assert [len(stats.layers) for stats in engine.transfers] == [4]
    source.close()


def test_an_error_of_the_lane_surfaces_at_acquire(sparse):
    converted, requests, _ = sparse

    class Broken(ThrottledTransport):
        def fetch(self, layer, buffer, lane):
            if layer == 2:
                lane.run(lambda: 1 / 0)
            return super().fetch(layer, buffer, lane)

    memory = filled_memory(converted, all_levels(converted.spec, "offloaded"))
    engine = streamed_engine(converted, wrapped(memory, lambda inner: Broken(inner, 1e12)))
    with pytest.raises(ZeroDivisionError):
        engine.score(requests)
    engine.close()
