"""Predicted sweeps of the baselines: on one rank those of the plain engine, on several with the bytes that are sent."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.costmodel import Batch, batch_flops, busiest_rank, predict_strategy, predict_sweep, ranks_a_row
from moe_prefill.machine import estimated_profile
from moe_prefill.models import preset, spec_from_hf

NAMES = ("dp+ep", "dp+tp", "tp+ep", "tp+tp", "pp+pp")
PROFILE = estimated_profile("NVIDIA H200")
LARGE = spec_from_hf(preset("Qwen3-235B-A22B"))
FEW = replace(LARGE, layers=LARGE.layers[:8])


def of(name: str, ranks: int, batch: Batch, **more):
    return predict_strategy(FEW, name, ranks, batch, PROFILE, precision="float8", **more)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prune_last", [False, True])
def test_on_one_rank_every_strategy_is_the_plain_engine(name, prune_last):
    batch = Batch.uniform(16384, 1024, prune_last=prune_last)
    want, got = predict_sweep(FEW, batch, PROFILE, precision="float8"), of(name, 1, batch)
    assert got.sweep_s == pytest.approx(want.compute_s, rel=1e-9)
    assert (got.transfer_s, got.fill_s, got.tokens, got.flops) == (0, 0, 16384, want.flops)


def test_bytes_are_those_of_the_formulas():
    """docs/communication.md, 235B shapes: 4096 channels, 8 experts a row; a float8 row takes 4100 bytes."""
    tokens, bandwidth = 8192, PROFILE.bandwidth("nccl")
    batch = Batch.uniform(tokens, 1024, prune_last=False)
    sent = {name: of(name, 4, batch).transfer_s * bandwidth / 8 / tokens for name in NAMES}
    assert sent["tp+tp"] == sent["tp+ep"] == pytest.approx(24_576)
    assert sent["dp+tp"] == pytest.approx(3 * (4100 + 64 + 8192))
    assert sent["dp+ep"] == pytest.approx(ranks_a_row(LARGE, 4) * (4100 + 64 + 8192))
    assert sent["pp+pp"] == 0


def test_ranks_that_a_row_goes_to():
    assert [round(ranks_a_row(LARGE, ranks), 2) for ranks in (2, 4, 8)] == [1.00, 2.72, 4.67]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.floats(1.0, 16.0))
def test_the_busiest_rank_has_more_than_the_mean_and_less_than_all(ranks, skew):
    load = busiest_rank(LARGE, ranks, skew)
    assert 1.0 <= load <= min(ranks, 16.0)
    assert (load == 1.0) == (ranks == 1 or skew == 1.0) or skew < 1.001


def test_uneven_experts_slow_down_where_whole_experts_are_dealt():
    for name in NAMES:
        batch = Batch.uniform(65536, 4096, prune_last=False)
        even, uneven = of(name, 8, batch), of(name, 8, batch, skew=16.0)
        assert (uneven.sweep_s > even.sweep_s) == name.endswith("+ep"), name


def test_a_pipeline_by_hand():
    """Eight layers on four ranks, four micro-batches of four requests: four times the slowest stage, which norms the
    embeddings too, three more to fill it. A request that is longer than a micro-batch is one of its own.
    """
    batch = Batch.uniform(16 * 1024, 1024, prune_last=False)
    alone = predict_sweep(FEW, Batch.uniform(4096, 1024, prune_last=False), PROFILE, precision="float8")
    stage_s = sum(alone.layer_s[:2])
    got = of("pp+pp", 4, batch, micro_batches=4)
    assert got.compute_s == pytest.approx(4 * stage_s, rel=1e-3)
    assert got.fill_s == pytest.approx(3 * stage_s, rel=1e-3)
    long = Batch.uniform(2 * 32768, 32768, prune_last=False)
    assert of("pp+pp", 4, long, micro_batches=8).sweep_s == of("pp+pp", 4, long, micro_batches=2).sweep_s


def test_flops_are_those_of_all_requests():
    batch = Batch.uniform(4096, 512)
    assert of("dp+ep", 4, batch).flops == 4 * batch_flops(FEW, batch)
    assert of("tp+tp", 4, batch).flops == batch_flops(FEW, batch)
