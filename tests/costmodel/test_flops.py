"""FLOPs: against operations counted in the plain model, and the properties that sharing asks for."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_prefill.core import AtomicRequest
from moe_prefill.costmodel import Batch, Rows, batch_flops, head_work, layer_work, sweep_flops
from moe_prefill.forest import SHARE_EVERYTHING, SHARE_NOTHING, build_forest
from tests.costmodel.models import model_spec, runs, specs, windows
from tests.reference import FAMILIES, VOCAB, convert, engine_of, random_model, random_requests

aten = torch.ops.aten
NO_IDS = np.zeros(0, np.int32)
SEEDS = 30 if os.environ.get("MOE_PREFILL_LONG") else 6


class Counter(TorchDispatchMode):
    """Counts 2 FLOPs a multiply-add of every matrix product, and for attention the pairs that are really visible."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.products = 0
        self.attention = 0
        self.square = 0
        self._head_dim = head_dim

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (aten.mm.default, aten.mm.out) or (func is aten.matmul.default and args[0].ndim == 2):
            self.products += 2 * args[0].numel() * args[1].shape[1]
        elif func in (aten.addmm.default, aten.addmm.out):
            self.products += 2 * args[1].numel() * args[2].shape[1]
        elif func in (aten.linear.default, aten.linear.out):
            self.products += 2 * args[0].numel() * args[1].shape[0]
        elif func is aten.bmm.default:
            self.square += 2 * args[0].numel() * args[1].shape[2]
        elif func is aten._softmax.default and out.ndim == 4:
            self.attention += 4 * self._head_dim * int((out > 0).sum())
        return out


@torch.no_grad()  # under inference mode, products arrive in pieces of other names
def counted(model, length: int) -> int:
    """FLOPs of transformers' model on one request of this length; logits at every position."""
    spec = convert(model).spec
    with Counter(spec.head_dim) as counter:
        model(torch.randint(0, VOCAB, (1, length)), use_cache=False)
    assert counter.square == 4 * spec.head_dim * spec.num_heads * spec.num_layers * length**2
    assert 0 < counter.attention <= counter.square
    return counter.products + counter.attention


def all_asked(rows: Rows) -> Batch:
    """Every row carried, the whole vocabulary read at each."""
    return Batch(rows, rows, rows.num_rows, rows.num_rows * VOCAB)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_plain_model(family, seed):
    model = random_model(family, seed)
    spec = convert(model).spec
    for length in (1, 7, 45):
        assert batch_flops(spec, all_asked(Rows.of(0, length))) == counted(model, length)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forest_costs_what_extending_its_prefixes_costs_the_plain_model(family):
    model = random_model(family, 2)
    spec = convert(model).spec
    lengths = range(1, 70)
    flops = [0, *(counted(model, length) for length in lengths)]
    for rule in (SHARE_EVERYTHING, SHARE_NOTHING):
        forest = build_forest(random_requests(4, count=12), rule)
        ends = forest.first_position + forest.stop - forest.start
        expected = sum(flops[end] - flops[begin] for begin, end in zip(forest.first_position, ends, strict=True))
        carried = np.arange(forest.num_tokens)
        batch = Batch.from_forest(forest, carried, asked_rows=len(carried), head_rows=VOCAB * len(carried))
        assert batch_flops(spec, batch) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_does_the_products_that_are_counted(family):
    converted = convert(random_model(family, 1))
    spec = converted.spec
    engine = engine_of(converted, sharing="off")
    requests = [
        AtomicRequest(t, np.r_[len(t) - 1].astype(np.int32), NO_IDS, np.zeros(2, np.int32), vocabulary=True)
        for t in random_requests(3)
    ]
    with Counter(spec.head_dim) as counter:
        engine.score(requests)
    rows = Rows.of(0, [len(request.tokens) for request in requests])
    last = Rows.of(rows.length - 1, 1)
    q_width = spec.num_heads * spec.head_dim
    attention = sum(rows.num_pairs(layer.window) for layer in spec.layers[:-1])
    attention = 4 * q_width * (attention + last.num_pairs(spec.layers[-1].window))
    pruned = Batch(rows, last, len(requests), VOCAB * len(requests))
    assert engine.stats.flops == batch_flops(spec, pruned) == counter.products + attention


def test_the_last_layer_costs_keys_and_values_and_what_is_carried():
    spec = model_spec(((True, None),))
    full, pruned = Batch.uniform(60, 20, prune_last=False), Batch.uniform(60, 20)
    d_model, row = 64, 2 * 64 * (2 * 64 + 8) + 6 * 64 * 2 * 24
    assert batch_flops(spec, full) == 60 * (row + 4 * d_model * 32) + 4 * 64 * 3 * 210 + 2 * 64 * 6
    assert batch_flops(spec, pruned) == 60 * 4 * d_model * 32 + 3 * row + 4 * 64 * 3 * 20 + 2 * 64 * 6


@given(runs(), windows)
def test_pairs_and_keys_are_those_of_the_definition(rows, window):
    wide = window or 1 << 30
    for first, length, pairs, keys in zip(rows.first, rows.length, rows.pairs(window), rows.keys(window), strict=True):
        positions = range(first, first + length)
        assert pairs == sum(min(p + 1, wide) for p in positions)
        assert keys == len({key for p in positions for key in range(max(0, p + 1 - wide), p + 1)})


@given(specs, runs(), st.data())
def test_a_segment_cut_in_two_costs_the_same(spec, rows, data):
    cuts = np.asarray([data.draw(st.integers(0, int(length))) for length in rows.length])
    both = [np.concatenate(pair) for pair in ((rows.first, rows.first + cuts), (cuts, rows.length - cuts))]
    split = Rows.of(both[0], both[1], np.tile(rows.count, 2))
    assert batch_flops(spec, all_asked(split)) == batch_flops(spec, all_asked(rows))


@given(specs, runs())
def test_flops_are_a_sum_over_segments_and_over_parts(spec, rows):
    batch = all_asked(rows)
    alone = [all_asked(Rows.of(f, n, c)) for f, n, c in zip(rows.first, rows.length, rows.count, strict=True)]
    total = batch_flops(spec, batch)
    assert total == sum(batch_flops(spec, one) for one in alone)
    parts = [work for index in range(spec.num_layers) for work in layer_work(spec, index, batch, "bfloat16").values()]
    assert total == sum(work.flops for work in [*parts, head_work(spec, batch, "bfloat16")])
    assert all((work.bytes > 0) or (work.flops == 0) for work in parts)


@given(specs, runs(), st.data())
def test_an_input_is_normed_once_by_what_writes_it(spec, rows, data):
    """The first layer reads and writes one norm of its input more than a layer in the middle, the last one writes none
    for a layer behind it.
    """
    layer = data.draw(st.sampled_from(spec.layers))
    spec = replace(spec, layers=(layer,) * 3)
    first, middle, last = (layer_work(spec, i, all_asked(rows), "bfloat16")["elementwise"].bytes for i in range(3))
    norm = 2 * rows.num_rows * spec.hidden_size
    assert (first - middle, middle - last) == (2 * norm, norm)


@given(specs, st.integers(1, 60), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_siblings_cost_one_prefix_and_their_suffixes(spec, prefix, suffixes):
    tokens = [np.r_[np.zeros(prefix), i + 1, np.zeros(n - 1)].astype(np.int32) for i, n in enumerate(suffixes)]
    forest = build_forest(tokens, SHARE_EVERYTHING)
    batch = Batch.from_forest(forest, np.arange(forest.num_tokens), asked_rows=0, head_rows=0)

    def cost(first: int, length: int) -> int:
        rows = Rows.of(first, length)
        return batch_flops(spec, Batch(rows, rows, 0, 0))

    assert batch_flops(spec, batch) == cost(0, prefix) + sum(cost(prefix, n) for n in suffixes)


@given(specs, runs(), runs())
def test_more_work_costs_more(spec, rows, more):
    together = Rows.of(*(np.concatenate([getattr(part, name) for part in (rows, more)]) for name in _FIELDS))
    deeper = Rows.of(rows.first + 1, rows.length, rows.count)
    assert batch_flops(spec, all_asked(together)) > batch_flops(spec, all_asked(rows))
    assert batch_flops(spec, all_asked(deeper)) >= batch_flops(spec, all_asked(rows))


_FIELDS = ("first", "length", "count")


@given(specs, st.integers(0, 10**6), st.data())
def test_carried_rows_of_a_forest_are_found_as_runs(spec, seed, data):
    forest = build_forest(random_requests(seed), SHARE_EVERYTHING)
    chosen = data.draw(st.lists(st.integers(0, forest.num_tokens - 1), min_size=1, unique=True).map(sorted))
    carried = np.asarray(chosen)
    batch = Batch.from_forest(forest, carried, asked_rows=len(carried), head_rows=3)
    assert batch.carried.num_rows == len(carried)
    expected = sweep_flops(spec, forest.positions, forest.positions[carried], 3)
    assert batch_flops(spec, batch) == expected


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_batch_of_requests_costs_what_the_engine_says_it_did(seed):
    """Candidates and vocabulary, duplicates and prefixes of one another, shared in full."""
    rng = np.random.default_rng(seed)
    converted = convert(random_model(FAMILIES[seed % 4], seed))
    requests = []
    for tokens in random_requests(seed, count=10):
        ids = rng.integers(0, VOCAB, rng.integers(0, 4)).astype(np.int32)
        asked, whole = np.r_[len(tokens) - 1].astype(np.int32), bool(rng.integers(2)) or not len(ids)
        requests.append(AtomicRequest(tokens, asked, ids, np.r_[0, len(ids)].astype(np.int32), vocabulary=whole))
    engine = engine_of(converted, sharing="force")
    salts = engine.forming.salts(requests)
    engine.score(requests)
    assert engine.stats.sweeps == 1
    batch = Batch.from_requests(requests, salts, SHARE_EVERYTHING, VOCAB)
    assert batch.num_tokens == engine.stats.computed_tokens
    assert batch_flops(converted.spec, batch) == engine.stats.flops
    assert batch_flops(converted.spec, batch.times(3)) == 3 * engine.stats.flops


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_a_hit_the_engine_does_the_products_that_are_counted(family):
    converted = convert(random_model(family, 1))
    spec, rng = converted.spec, np.random.default_rng(7)
    engine = engine_of(converted, sharing="off", kv_blocks=100)
    prompts = [rng.integers(0, VOCAB, length).astype(np.int32) for length in (40, 25, 9)]

    def asking(tokens):
        asked = np.asarray([len(tokens) - 1], np.int32)
        return AtomicRequest(tokens, asked, NO_IDS, np.zeros(2, np.int32), vocabulary=True)

    engine.score([asking(tokens) for tokens in prompts])
    before = engine.stats.flops
    requests = [asking(np.r_[tokens, tokens[:5]]) for tokens in prompts]
    with Counter(spec.head_dim) as counter:
        engine.score(requests)
    held = [32, 16, 0]
    first, lengths = np.asarray(held), np.asarray([len(request.tokens) for request in requests])
    rows, last = Rows.of(first, lengths - first), Rows.of(lengths - 1, 1)
    attention = sum(rows.num_pairs(layer.window) for layer in spec.layers[:-1])
    attention = 4 * spec.num_heads * spec.head_dim * (attention + last.num_pairs(spec.layers[-1].window))
    counted_flops = counter.products + attention
    assert engine.stats.flops - before == batch_flops(spec, Batch(rows, last, 3, 3 * VOCAB)) == counted_flops
    batch = Batch.from_requests(requests, ["", "", ""], SHARE_NOTHING, VOCAB, held)
    assert batch.num_tokens == lengths.sum() - 48
    assert batch_flops(spec, batch) == counted_flops


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_saves_what_computing_it_costs_the_plain_model(family):
    model = random_model(family, 2)
    spec = convert(model).spec
    for held, length in ((16, 45), (32, 33)):
        saved = batch_flops(spec, all_asked(Rows.of(0, length))) - batch_flops(
            spec, all_asked(Rows.of(held, length - held))
        )
        assert saved == counted(model, held)
