"""Prefixes that outlive their sweep: answers are those of an engine without a pool, whatever came before."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_prefill import Engine
from moe_prefill.blocks import BlockHasher, HashedSweep, usable_blocks
from moe_prefill.core import NOT_KEPT, AtomicRequest
from tests.reference import (
    FAMILIES,
    VOCAB,
    convert,
    engine_of,
    random_model,
    reference_logits,
    smallest_routing_gap,
)

IS_LONG = bool(os.environ.get("MOE_PREFILL_LONG"))
DEMO = Path(__file__).resolve().parents[2] / "examples/demo_model/checkpoint"
FOUR = np.arange(4, dtype=np.int32)


def asking(tokens: np.ndarray, positions: list[int], salt: str = "") -> AtomicRequest:
    """Four candidates and the log-partition at each position."""
    asked = np.asarray(positions, np.int32)
    offsets = 4 * np.arange(len(asked) + 1, dtype=np.int32)
    return AtomicRequest(tokens, asked, np.tile(FOUR, len(asked)), offsets, vocabulary=True, salt=salt)


def question(document: np.ndarray, *tail: int, salt: str = "") -> AtomicRequest:
    tokens = np.concatenate([document, np.asarray(tail, np.int32)])
    return asking(tokens, [len(tokens) - 1], salt)


def random_tokens(length: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def comparable(model, seed: int) -> list[np.ndarray]:
    """A document of 80 tokens, and requests that begin like it; their routing is decided by more than rounding."""
    for attempt in range(40):
        document = random_tokens(80, seed, attempt)
        tails = [random_tokens(9, seed, attempt, index) for index in range(3)]
        sequences = [np.concatenate([document[:keep], tail]) for keep, tail in zip((80, 40, 71), tails, strict=True)]
        found = [document, *sequences, document[:64].copy()]
        if min(smallest_routing_gap(model, tokens) for tokens in found) > 1e-5:
            return found
    raise AssertionError("no comparable requests in 40 draws")


def is_same(one, other) -> bool:
    close = np.abs(one.logits - other.logits).max() <= 1e-4 * np.abs(other.logits).max()
    return bool(close and np.allclose(one.log_z, other.log_z, rtol=1e-4, atol=1e-4))


def assert_same(results, expected, what=None):
    for one, other in zip(results, expected, strict=True):
        assert is_same(one, other), (what, one, other)


@pytest.mark.parametrize("seed", range(12 if IS_LONG else 4))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_behind_a_hit_equal_transformers(family, seed):
    model = random_model(family, seed)
    converted = convert(model)
    document, *sequences = comparable(model, seed)
    expected = [reference_logits(model, tokens) for tokens in sequences]
    for options in ({}, {"sharing": "off", "chunk_rows": 7}, {"sharing": "force"}, {"prune_last": False}):
        for first in (80, 33, 1):  # asked from here on
            engine = engine_of(converted, kv_blocks=30, **options)
            engine.score([question(document, 1)])
            requests = [asking(t, list(range(min(first, len(t) - 1), len(t)))) for t in sequences]
            results = engine.score(requests)
            is_private = engine.forming.private_beyond is not None and engine.forming.private_beyond < 80
            assert (engine.stats.pooled_tokens == 0) == (first == 1 or is_private)
            for request, result, logits in zip(requests, results, expected, strict=True):
                want = logits[request.positions]
                got = result.logits.reshape(len(want), -1)
                assert np.abs(got - want[:, :4]).max() <= 1e-4 * np.abs(want).max(), (family, seed, options, first)
                log_z = torch.as_tensor(want).logsumexp(-1).numpy()
                np.testing.assert_allclose(result.log_z, log_z, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def converted():
    return convert(random_model("qwen3_moe", 9))


@pytest.mark.parametrize(
    ("length", "positions", "hit"),
    [
        (81, [80], 80),
        (80, [79], 64),  # the last token is computed
        (96, [95], 80),  # only what was stored
        (81, [17, 80], 16),  # log-probabilities inside the prefix
        (81, [16, 80], 16),
        (81, [15, 80], 0),
    ],
)
def test_a_hit_ends_before_what_is_asked(converted, length, positions, hit):
    tokens = random_tokens(96, 1)
    engine = engine_of(converted, kv_blocks=24)
    engine.score([question(tokens[:80], 5)])
    computed, flops = engine.stats.computed_tokens, engine.stats.flops
    request = asking(tokens[:length], positions)
    results = engine.score([request])
    assert engine.stats.pooled_tokens == hit
    assert engine.stats.computed_tokens - computed == length - hit
    plain = engine_of(converted)
    assert_same(results, plain.score([request]))
    saved = plain.stats.flops - (engine.stats.flops - flops)
    assert (saved > 0) == (hit > 0)


def test_a_prefix_of_another_request_is_not_computed_beyond_what_it_asks(converted):
    tokens = random_tokens(90, 2)
    engine = engine_of(converted, kv_blocks=24)
    engine.score([question(tokens[:80], 5)])
    early, late = asking(tokens[:20].copy(), [19]), asking(tokens, [89])
    results = engine.score([early, late])
    assert engine.stats.pooled_tokens == 16 + 60, "rows 16 to 19 for the one, 80 to 89 for the other"
    assert_same(results, engine_of(converted).score([early, late]))


def test_salted_requests_hit_only_their_own(converted):
    document = random_tokens(80, 3)
    engine = engine_of(converted, kv_blocks=40)
    engine.score([question(document, 5, salt="a")])
    for salt, hit in (("", 0), ("b", 0), ("a", 80), ("b", 80)):
        before = engine.stats.pooled_tokens
        request = question(document, 6, salt=salt)
        assert_same(engine.score([request]), engine_of(converted).score([request]))
        assert engine.stats.pooled_tokens - before == hit, salt


def test_a_warm_up_leaves_nothing_in_the_pool(converted):
    document = random_tokens(80, 3)
    engine = engine_of(converted, kv_blocks=40)
    kept = question(document, 5)
    engine.score([kept])
    pool = engine.snapshot().changes
    for _ in range(2):
        engine.score([question(document, 5, salt=NOT_KEPT), question(random_tokens(200, 4), 5, salt=NOT_KEPT)])
    assert engine.stats.pooled_tokens == 0
    assert engine.snapshot().changes == pool
    assert_same(engine.score([kept]), engine_of(converted).score([kept]))
    assert engine.stats.pooled_tokens == 80


def test_two_salts_in_one_sweep_keep_apart(converted):
    document = random_tokens(80, 3)
    engine = engine_of(converted, kv_blocks=40, sharing="force")
    requests = [question(document, tail, salt=salt) for tail in (5, 6) for salt in "ab"]
    engine.score(requests)
    assert engine.stats.computed_tokens == 2 * 82
    results = engine.score(requests)
    assert engine.stats.pooled_tokens == 2 * 80
    assert_same(results, engine_of(converted).score(requests))


def test_without_blocks_there_is_no_pool(converted):
    engine = engine_of(converted, kv_blocks=0)
    assert engine.take_events() is None
    assert engine.snapshot() is None
    assert engine.plan_digest == engine_of(converted).plan_digest != engine_of(converted, kv_blocks=1).plan_digest


def test_a_pool_smaller_than_the_prefix_keeps_its_beginning(converted):
    document = random_tokens(80, 4)
    engine = engine_of(converted, kv_blocks=3, sharing="force")
    requests = [question(document, tail) for tail in (5, 6)]
    engine.score(requests)
    assert_same(engine.score(requests), engine_of(converted).score(requests))
    assert engine.stats.pooled_tokens == 48


def test_the_next_sweep_is_enqueued_early_and_hits_all_the_same(converted):
    document = random_tokens(80, 5)
    engine = engine_of(converted, kv_blocks=24)
    requests = [question(document, tail) for tail in range(4)]
    results = list(engine.compute([[request] for request in requests]))
    assert engine.stats.pooled_tokens == 3 * 80
    assert_same([result for (result,) in results], engine_of(converted).score(requests))


def test_the_caller_says_what_is_shared_and_takes_the_events(converted):
    """With names of its own, as the frontend has them; of a large sweep only what it calls shared is kept."""
    hasher, document = BlockHasher("a model"), random_tokens(80, 6)
    engine = engine_of(converted, kv_blocks=8)
    request = question(document, 5)
    chain = hasher.chain(request.tokens, tenant="t")
    (_,) = engine.compute([HashedSweep([request], [chain], [2])])
    changes = [(change.kind, change.digests) for change in engine.take_events().changes]
    stored = (chain[1], chain[0])
    assert changes == [("stored", stored), ("used", stored)], "5 blocks are more than a quarter"
    assert engine.take_events().changes == ()
    assert engine.snapshot().changes[0].digests == stored
    (_,) = engine.compute([HashedSweep([request], [chain], [5])])
    assert engine.stats.pooled_tokens == 32
    assert [(change.kind, len(change.digests)) for change in engine.take_events().changes] == [
        ("stored", 3),
        ("used", 5),
    ]


def test_a_sweep_that_fails_leaves_nothing_behind(converted, monkeypatch):
    document = random_tokens(80, 7)
    engine = engine_of(converted, kv_blocks=24)
    engine.score([question(document[:32], 5)])

    def fails(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_run", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.score([question(document, 5)])
    assert len(engine.snapshot().changes[0].digests) == 2
    request = question(document, 6)
    assert_same(engine.score([request]), engine_of(converted).score([request]))
    assert engine.stats.pooled_tokens == 32


# Requests of a few documents, cut anywhere, with tails, questions, salts; blocks are few, so that they are evicted.
REQUESTS = st.builds(
    lambda document, keep, tail, salt, asked: (document, keep, tail, salt, asked),
    st.integers(0, 1),
    st.integers(0, 70),
    st.integers(1, 5),
    st.sampled_from(["", "", "a"]),
    st.lists(st.integers(0, 74), max_size=2),
)
SWEEPS = st.lists(st.lists(REQUESTS, min_size=1, max_size=5), min_size=2, max_size=5)


def request_of(document: int, keep: int, tail: int, salt: str, asked: list[int]) -> AtomicRequest:
    tokens = np.concatenate([random_tokens(70, 50 + document)[:keep], np.arange(tail, dtype=np.int32)])
    return asking(tokens, sorted({len(tokens) - 1} | {position for position in asked if position < len(tokens)}), salt)


@pytest.mark.parametrize(("family", "seed"), [("qwen3_moe", 9), ("qwen2_moe", 5), ("mixtral", 3), ("olmoe", 0)])
def test_any_history_gives_the_same_answers(family, seed):
    reference = random_model(family, seed)
    model = convert(reference)
    plain, hits = engine_of(model), []

    @given(
        SWEEPS,
        st.sampled_from([1, 3, 6, 20]),
        st.sampled_from(["off", "auto", "force"]),
        st.sampled_from([None, 5, 40]),
        st.booleans(),
    )
    @settings(max_examples=200 if IS_LONG else 12, deadline=None)
    def check(sweeps, blocks, sharing, chunk_rows, prune_last):
        engine = engine_of(model, kv_blocks=blocks, sharing=sharing, chunk_rows=chunk_rows, prune_last=prune_last)
        for sweep in sweeps:
            requests = [request_of(*parts) for parts in sweep]
            for request, *both in zip(requests, engine.score(requests), plain.score(requests), strict=True):
                if not is_same(*both):
                    assume(smallest_routing_gap(reference, request.tokens) > 1e-5)
                assert_same(*([result] for result in both), request)
            assert len(engine.snapshot().changes[0].digests) <= blocks
        hits.append(engine.stats.pooled_tokens)

    check()
    assert any(hits)


def test_usable_blocks_end_before_the_first_asked_position():
    tokens = random_tokens(50, 8)
    assert [usable_blocks(asking(tokens, [first, 49])) for first in (0, 15, 16, 31, 32, 48)] == [0, 0, 1, 1, 2, 3]


@pytest.fixture
def _one_thread_afterwards():
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_one_thread_afterwards")
@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("float32", 3), ("bfloat16", 1)])
def test_a_second_question_about_a_text_hits_from_python(dtype, threads):
    mail = " ".join(f"Line {index}: please send the report on day {index} of the month." for index in range(40))
    options = {"labels": ["spam", "ham"], "template": "{text}\n\nQuestion: Is this {kind}?\nAnswer:"}
    with Engine(DEMO, device="cpu", dtype=dtype, threads=threads, kv_gib=0.05) as engine:
        first = engine.classify([{"text": mail, "kind": "spam or ham"}], **options)
        assert engine.stats.pooled_tokens == 0
        again = engine.classify([{"text": mail, "kind": "spam or ham"}], **options)
        other = engine.classify([{"text": mail, "kind": "ham, or is it spam"}], **options)
        assert engine.stats.pooled_tokens > 0.9 * engine.stats.prompt_tokens / 3 * 2
    tolerance = 1e-4 if dtype == "float32" else 0.02
    assert first[0].probability == pytest.approx(again[0].probability, rel=tolerance)
    with Engine(DEMO, device="cpu", dtype=dtype, threads=1) as engine:
        (want,) = engine.classify([{"text": mail, "kind": "ham, or is it spam"}], **options)
    assert other[0].probabilities["spam"] == pytest.approx(want.probabilities["spam"], rel=tolerance)


def test_under_dynamic_rope_requests_beyond_the_original_context_neither_hit_nor_leave_anything(converted):
    rope = replace(converted.spec.rope, kind="dynamic", factor=2.0, original_max_positions=64)
    model = replace(converted, spec=replace(converted.spec, rope=rope))
    engine, plain = engine_of(model, kv_blocks=40), engine_of(model)
    document = random_tokens(100, 12)
    for length, hit, held in ((90, 0, 0), (60, 0, 3), (95, 0, 3), (64, 48, 4), (50, 48, 4)):
        before = engine.stats.pooled_tokens
        request = question(document[: length - 1], 1)
        assert_same(engine.score([request]), plain.score([request]), length)
        assert engine.stats.pooled_tokens - before == hit, length
        assert len(engine.snapshot().changes[0].digests) == held, length
