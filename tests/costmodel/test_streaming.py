"""Predicted sweeps and T: the simulation against the windows, and what must hold whatever the numbers are."""

import dataclasses
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_prefill.costmodel import (
    PARTS,
    BankCopy,
    Batch,
    Streaming,
    bank_copies,
    batch_flops,
    exposure,
    predict_sweep,
    saturation,
    tightest_window,
)
from moe_prefill.errors import PlanError, UsageError
from moe_prefill.machine import Curve, estimated_profile
from moe_prefill.models import preset, spec_from_hf
from moe_prefill.residency import bank_bytes
from tests.costmodel.models import machine_profile, model_spec

BANK = 8 * 3 * 24 * 64 * 4
levels_of = st.lists(st.sampled_from(["resident", "offloaded", "sharded", "hybrid"]), min_size=3, max_size=8)


@st.composite
def streams(draw):
    """Whole seconds, so that sums are exact: layers, tail, copies, depth."""
    layer_s = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    streamed = draw(st.lists(st.sampled_from(range(len(layer_s))), min_size=1, unique=True).map(sorted))
    copies = [BankCopy(i, draw(st.sampled_from(["host", "copy-engine"])), draw(st.integers(1, 12))) for i in streamed]
    return [float(s) for s in layer_s], float(draw(st.integers(0, 3))), copies, draw(st.integers(1, 4))


@given(streams())
@settings(max_examples=300)
def test_nothing_is_exposed_exactly_where_every_window_fits(stream):
    layer_s, tail_s, copies, depth = stream
    window = tightest_window(layer_s, tail_s, copies, depth)
    assert (exposure(*stream).steady_s == 0) == (window.copy_s <= window.compute_s)


@given(streams())
def test_a_sweep_takes_at_least_its_compute_and_each_links_copies(stream):
    layer_s, tail_s, copies, _ = stream
    waits = exposure(*stream)
    sweep_s = sum(layer_s) + tail_s + waits.steady_s
    for link in ("host", "copy-engine"):
        assert sweep_s >= sum(copy.seconds for copy in copies if copy.link == link) - 1e-9
    assert waits.first_s >= copies[0].seconds - sum(layer_s[: copies[0].layer])
    assert waits.steady_s >= 0


@given(streams(), st.integers(1, 3))
def test_more_buffers_and_faster_links_never_wait_longer(stream, more):
    layer_s, tail_s, copies, depth = stream
    steady = exposure(*stream).steady_s
    assert exposure(layer_s, tail_s, copies, depth + more).steady_s <= steady + 1e-9
    faster = [dataclasses.replace(copy, seconds=copy.seconds / (1 + more)) for copy in copies]
    assert exposure(layer_s, tail_s, faster, depth).steady_s <= steady + 1e-9
    assert exposure(layer_s, tail_s, copies[1:], depth).steady_s <= steady + 1e-9


def test_a_worked_example():
    """Four layers of 2 s, banks of 3 s, two buffers: each layer but the first waits 1 s for the next bank; in the
    steady state the first one does too.
    """
    copies = [BankCopy(layer, "host", 3.0) for layer in range(4)]
    waits = exposure([2.0] * 4, 0.0, copies, 2)
    assert (waits.first_s, waits.steady_s) == (3.0 + 3 * 1.0, 4.0)
    window = tightest_window([2.0] * 4, 0.0, copies, 2)
    assert (window.copy_s, window.compute_s) == (3.0, 2.0)


def test_a_short_last_layer_exposes_the_next_sweeps_first_bank():
    """Banks of 1.5 s behind layers of 2 s, the last one cut to 0.5 s: with two buffers the next first bank begins with
    it and comes 1 s late. A third buffer, or any bank behind which two layers follow, hides it.
    """
    layer_s, copies = [2.0, 2.0, 2.0, 0.5], [BankCopy(layer, "host", 1.5) for layer in range(4)]
    assert exposure(layer_s, 0.0, copies, 2).steady_s == 1.0
    assert exposure(layer_s, 0.0, copies, 3).steady_s == 0.0
    for resident in (0, 2):
        assert exposure(layer_s, 0.0, [copy for copy in copies if copy.layer != resident], 2).steady_s == 0.0


def test_what_each_level_brings_over_which_link():
    profile = machine_profile(host=1e9)  # copy-engine 4e9, nccl 3e9
    four = Streaming(levels=("resident", "sharded", "offloaded", "hybrid", None), bank_bytes=12_000_000, ranks=4)
    on_four = bank_copies(profile, four)
    assert on_four == (
        BankCopy(1, "copy-engine", 9e6 / 4e9),
        BankCopy(2, "host", 12e6 / 1e9),
        BankCopy(3, "host", 3e6 / 1e9),
    )
    by_nccl = bank_copies(profile, dataclasses.replace(four, peer="nccl"))
    assert by_nccl[::2] == (BankCopy(1, "nccl", 9e6 / 3e9), BankCopy(3, "nccl", 3e6 / 1e9))
    assert bank_copies(profile, Streaming(levels=("sharded",), bank_bytes=12_000_000, peer="nccl")) == ()
    without = machine_profile(transfers={"host": 1e9})
    with pytest.raises(UsageError, match="no bandwidth for copy-engine, only host"):
        bank_copies(without, Streaming(levels=("sharded",), bank_bytes=1, ranks=2))


@given(st.integers(1, 3000), st.integers(1, 500), st.booleans(), st.sampled_from(["float32", "bfloat16"]))
@example(1, 2, True, "float32")  # more tokens beside as few queries
def test_predictions_add_up_and_grow_with_the_batch(tokens, per_request, prune, precision):
    spec, profile = model_spec(((True, None), (False, 5), (True, 40))), machine_profile()
    batch, more = (Batch.uniform(n, per_request, prune_last=prune) for n in (tokens, tokens + per_request))
    one, two = (predict_sweep(spec, b, profile, precision=precision) for b in (batch, more))
    assert one.flops == batch_flops(spec, batch)
    assert one.exposed_s == one.exposed_first_s == 0
    assert math.isclose(one.sweep_s, sum(sum(parts.values()) for parts in one.parts) + one.head_s)
    assert all(set(parts) == set(PARTS) for parts in one.parts)
    assert two.compute_s >= one.compute_s
    assert all(two.parts[i][part] >= one.parts[i][part] * (1 - 1e-12) for i in range(3) for part in PARTS)


def test_a_precision_that_was_not_measured_is_refused():
    with pytest.raises(UsageError, match="no float8 rate for grouped, only float32, bfloat16"):
        predict_sweep(model_spec(), Batch.uniform(10, 10), machine_profile(), precision="float8")


SATURATION = {"precision": "float32", "tokens_per_request": 64}


def streaming(levels, **changes):
    return Streaming(**{"levels": tuple(levels), "bank_bytes": BANK, "depth": 3, **changes})


@given(levels_of, st.integers(1, 4), st.floats(1e8, 1e10))
@settings(max_examples=60, deadline=None)
def test_at_t_nothing_is_exposed(levels, ranks, host):
    spec, profile = model_spec(((True, None),) * len(levels)), machine_profile(host)
    stream = streaming(levels, ranks=ranks)
    found = saturation(spec, profile, streaming=stream, **SATURATION)
    at_t = predict_sweep(spec, Batch.uniform(found.tokens, 64), profile, precision="float32", streaming=stream)
    assert at_t.flops >= found.flops > 0
    assert at_t.exposed_s == 0
    if found.window is not None:
        assert found.window.copy_s <= found.window.compute_s
        assert batch_flops(spec, Batch.uniform(found.tokens - 1, 64)) < found.flops


@given(levels_of, st.integers(0, 7), st.floats(1.0, 10.0))
@settings(max_examples=40, deadline=None)
def test_resident_layers_and_faster_links_lower_t(levels, index, speedup):
    spec = model_spec(((True, None),) * len(levels))
    stream = streaming(levels, ranks=2)
    t = saturation(spec, machine_profile(), streaming=stream, **SATURATION)
    faster = saturation(spec, machine_profile(1e9 * speedup), streaming=stream, **SATURATION)
    assert faster.flops <= t.flops
    fewer = [*levels]
    fewer[index % len(levels)] = "resident"
    if t.window is not None and set(fewer) != {"resident"}:
        assert saturation(spec, machine_profile(), streaming=streaming(fewer, ranks=2), **SATURATION).flops <= t.flops


def test_uniform_streaming_is_the_papers_equation_times_the_layers():
    """Where everything runs at one rate and no layer is cut short, T is the paper's, up to one token's FLOPs."""
    rate = {"float32": Curve.constant(2e9)}
    one_rate = {"gemm": rate, "grouped": rate, "attention": rate}
    free = {"elementwise": {"float32": Curve.constant(1e30)}, "memory_bandwidth": 1e30, "layer_overhead_s": 0.0}
    spec, profile = model_spec(((True, None),) * 12), machine_profile(**one_rate, **free)
    found = saturation(spec, profile, streaming=streaming(["offloaded"] * 12), prune_last=False, **SATURATION)
    paper = 1.2 * (BANK / 1e9) * 2e9 * 12
    assert found.t_paper == math.ceil(paper)
    token = batch_flops(spec, Batch.uniform(64, 64, prune_last=False)) / 64
    assert paper - token <= found.flops <= paper + 2 * 1.2 * token


def test_t_paper_takes_the_slowest_transfer_and_the_datasheet_rate():
    profile = machine_profile(gpu="NVIDIA H100 80GB HBM3")
    stream = streaming(["resident", "offloaded", "sharded"], ranks=2)
    found = saturation(model_spec(), profile, streaming=stream, **{**SATURATION, "precision": "bfloat16"})
    assert found.t_paper == math.ceil(1.2 * BANK / 1e9 * 989e12 * 3)


@pytest.mark.parametrize("levels", [(), ("resident", None, "resident")])
def test_without_streaming_t_is_where_the_plateau_begins(levels):
    spec, profile = model_spec(), machine_profile()
    found = saturation(spec, profile, streaming=streaming(levels), **SATURATION)
    assert (found.window, found.t_paper) == (None, 0)
    assert found.flops == batch_flops(spec, Batch.uniform(found.tokens, 64)) > 0

    def rate(tokens: int) -> float:
        return tokens / predict_sweep(spec, Batch.uniform(tokens, 64), profile, precision="float32").sweep_s

    plateau = rate(64 << 20)
    assert rate(found.tokens) >= 0.95 * plateau * (1 - 1e-6)
    assert rate(found.tokens - 64) < 0.95 * plateau


def test_streaming_that_no_sweep_hides_is_refused():
    with pytest.raises(PlanError, match=r"no sweep hides the banks of layers .* with 1 bank buffer; give a larger"):
        saturation(model_spec(), machine_profile(), streaming=streaming(["offloaded"] * 3, depth=1), **SATURATION)


@pytest.mark.parametrize(
    ("first", "depth", "ratio"), [("offloaded", 2, 16.3), ("offloaded", 3, 0.49), ("resident", 2, 0.48)]
)
def test_the_pruned_last_layer_hides_little_of_the_next_sweeps_first_bank(first, depth, ratio):
    """The table of docs/costmodel.md: Qwen3-30B-A3B on an estimated H200, everything but the first bank offloaded."""
    spec = spec_from_hf(preset("Qwen3-30B-A3B"))
    bank = bank_bytes(spec, "bfloat16")
    stream = streaming([first, *["offloaded"] * 47], bank_bytes=bank, depth=depth)
    found = saturation(spec, estimated_profile("NVIDIA H200"), precision="bfloat16", streaming=stream)
    assert found.flops / found.t_paper == pytest.approx(ratio, rel=0.02)
