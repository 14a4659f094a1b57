"""The residency plan: within the budget, the best levels, spread evenly, and never worse with more memory."""

from __future__ import annotations

import dataclasses
import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.core import LayerSpec, ModelSpec, RopeSpec
from moe_prefill.errors import PlanError, UsageError
from moe_prefill.machine import estimated_profile
from moe_prefill.memory import GIB, is_good, largest_sweep, memory_plan, plan_memory, sweep_sizes
from moe_prefill.models import preset, spec_from_hf
from moe_prefill.residency import (
    Budget,
    Pins,
    ResidencyPlan,
    bank_bytes,
    parse_residency,
    plan_residency,
    predicted_speed,
    predictions,
    residency_map,
    shard_bytes,
    weight_bytes,
)
from moe_prefill.residency.levels import levels_of, spread
from moe_prefill.residency.record import block_scale_bytes

EXAMPLES = 2000 if os.environ.get("MOE_PREFILL_LONG") else 150
FP8 = "float8_e4m3fn"


def model(sparse: list[bool], *, experts: int = 8, size: int = 512, hidden: int = 256) -> ModelSpec:
    return ModelSpec(
        family="qwen3_moe",
        vocab_size=1000,
        hidden_size=hidden,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        layers=tuple(LayerSpec(sparse=each) for each in sparse),
        num_experts=experts,
        top_k=2,
        expert_size=size,
        dense_size=512,
        norm_eps=1e-6,
        rope=RopeSpec(dim=64),
        max_positions=1 << 20,
    )


def published(name: str) -> ModelSpec:
    return spec_from_hf(preset(name))


def plan(spec: ModelSpec, device_gib: float, host_gib: float, ranks: int = 1, **pins) -> ResidencyPlan:
    """``host_gib``: of the whole host. FP8 experts for the large model, as it is run."""
    budget = Budget(device_bytes=int(device_gib * GIB), host_bytes=int(host_gib * GIB) // ranks, ranks=ranks)
    bank_dtype = pins.pop("bank_dtype", FP8 if spec.num_layers == 94 else "bfloat16")
    speed = pins.pop("speed", None)
    return plan_residency(spec, budget, dtype="bfloat16", bank_dtype=bank_dtype, pins=Pins(**pins), speed=speed)


def streamed_gaps(levels) -> list[int]:
    """Sparse layers from one streamed layer to the next, round from the last to the first."""
    sparse = [level for level in levels if level is not None]
    places = [index for index, level in enumerate(sparse) if level != "resident"]
    return [(b - a - 1) % len(sparse) + 1 for a, b in zip(places, places[1:] + places[:1], strict=True)]


# The published shapes on machines that people have.


def test_qwen3_235b_in_fp8_on_one_gpu_of_139_gib_and_a_host_of_128():
    found = plan(published("Qwen3-235B-A22B"), 139, 128)
    assert set(found.levels) == {"resident", "offloaded"}
    assert 45 <= found.count("resident") <= 55
    assert 90 <= found.host_bytes["pinned banks"] / GIB <= 107
    assert found.peak_host_bytes <= 128 * GIB
    assert found.sweep.max_sweep_tokens >= 65536
    assert found.peak_device_bytes <= 139 * GIB
    assert max(streamed_gaps(found.levels)) <= 3


def test_qwen3_30b_in_bf16_capped_to_16_gib_is_nearly_all_offloaded():
    found = plan(published("Qwen3-30B-A3B"), 16, 128)
    assert found.count("offloaded") >= 40
    assert found.sweep.max_sweep_tokens >= 65536


def test_qwen3_30b_on_80_gib_is_resident_and_needs_no_buffers():
    found = plan(published("Qwen3-30B-A3B"), 80, 0)
    assert (found.map, found.bank_buffers, found.peak_host_bytes) == ("R" * 48, 0, 0)
    assert found.sweep.chunk_rows == 65536


@pytest.mark.parametrize(("ranks", "worst"), [(8, "sharded"), (4, "sharded"), (2, "hybrid"), (3, "hybrid")])
def test_qwen3_235b_among_gpus_of_79_gib(ranks, worst):
    found = plan(published("Qwen3-235B-A22B"), 79, 512, ranks)
    assert found.count(worst) > 0
    assert found.count("offloaded") == 0
    assert (found.count("hybrid") == 0) == (worst == "sharded")
    assert (found.bank_buffers, found.staged_shards) == (2, 3 if worst == "hybrid" else 0)


# Refusals.


def test_what_cannot_fit_says_what_it_needs_and_what_there_is():
    with pytest.raises(PlanError) as refused:
        plan(published("Qwen3-235B-A22B"), 139, 64)
    text = str(refused.value)
    assert "of device memory and there are 139.00 GiB" in text
    assert "resident banks: " in text
    assert "pinned banks: 58.59 GiB" in text
    assert "--host-gib; all banks take 211.82 GiB" in text


def test_a_sweep_that_is_too_large_names_the_largest():
    spec = published("Qwen3-30B-A3B")
    with pytest.raises(PlanError, match=r"the largest sweep that fits has ([\d,]+) tokens") as refused:
        plan(spec, 16, 128, max_sweep_tokens=4_000_000)
    largest = int(str(refused.value).split("sweep that fits has ")[1].split(" ")[0].replace(",", ""))
    assert plan(spec, 16, 128, max_sweep_tokens=largest).peak_device_bytes <= 16 * GIB
    with pytest.raises(PlanError):
        plan(spec, 16, 128, max_sweep_tokens=largest + 100)


def test_a_pinned_residency_that_cannot_fit_is_refused():
    with pytest.raises(PlanError, match=r"(?s)with banks 48 resident.*use --residency auto"):
        plan(published("Qwen3-30B-A3B"), 16, 128, residency="resident", max_sweep_tokens=1000)


@pytest.mark.parametrize(
    ("text", "ranks", "complaint"),
    [
        ("sharded", 1, "needs at least two GPUs"),
        ("hybrid", 1, "needs at least two GPUs"),
        ("offloaded", 2, "is for one GPU, and there are 2"),
        ("resident,resident", 1, "names 2 layers, and the model has 4"),
        ("RR", 1, "names 2 layers, and the model has 4"),
        ("resident:1,offloaded:1", 1, "counts 2 layers, and 3 layers of the model have experts"),
        ("resident:1,resident:2", 1, "give each level once"),
        ("resident:x,offloaded:2", 1, "give each level once"),
        ("dense:1,offloaded:2", 1, "give each level once"),
        ("RRRR", 1, "says resident for layer 0, which is dense"),
        ("-R-R", 1, "says dense for layer 2, which has experts"),
        ("somewhere", 1, "it may say auto, resident, sharded, offloaded, hybrid, dense"),
        ("", 1, "it may say auto"),
    ],
)
def test_a_wrong_residency_is_refused(text, ranks, complaint):
    with pytest.raises(UsageError, match=complaint):
        parse_residency(text, model([False, True, True, True]), ranks)


def test_ways_to_write_a_residency():
    spec = model([False, True, True, True])
    one = (None, "resident", "offloaded", "resident")
    assert parse_residency("-ROR", spec, 1) == one
    assert parse_residency("dense,resident,offloaded,resident", spec, 1) == one
    assert parse_residency("offloaded", spec, 1) == (None, *["offloaded"] * 3)
    assert parse_residency("resident:2,offloaded:1", spec, 1) == (None, "resident", "resident", "offloaded")
    assert parse_residency("auto", spec, 1) is None


def test_a_printed_map_can_be_pinned():
    spec = published("Qwen3-235B-A22B")
    found = plan(spec, 139, 128)
    again = plan(spec, 139, 128, residency=found.map, max_sweep_tokens=found.sweep.max_sweep_tokens)
    assert dataclasses.replace(again, largest_streamed_tokens=found.largest_streamed_tokens) == found


def test_depth_costs_buffers():
    spec = model([True] * 8)
    shallow, deep = (plan(spec, 8, 8, residency="offloaded", prefetch_depth=depth) for depth in (1, 3))
    assert (shallow.bank_buffers, deep.bank_buffers) == (2, 4)
    assert deep.device_bytes["bank buffers"] == 4 * bank_bytes(spec, "bfloat16")
    staged = plan(spec, 8, 8, 2, residency="hybrid", prefetch_depth=3)
    assert (staged.bank_buffers, staged.staged_shards) == (2, 4)
    with pytest.raises(UsageError, match="at least 1"):
        plan(spec, 8, 8, prefetch_depth=0)


def test_one_layer_and_no_experts():
    assert plan(model([True]), 4, 4).map == "R"
    assert plan(model([True]), 4, 4, residency="offloaded").map == "O"
    assert plan(model([False]), 4, 4).map == "-"


def test_block_scales_are_a_small_part_of_a_bank():
    """The figures in docs/residency.md."""
    for name, layer, whole in (("Qwen3-30B-A3B", 0.28, 13.5), ("Qwen3-235B-A22B", 1.125, 105.75)):
        spec, mib = published(name), 1 << 20
        sizes = weight_bytes(spec, 2, float8=True), weight_bytes(spec, 2)
        assert block_scale_bytes(spec) / mib == pytest.approx(layer, abs=0.01)
        assert block_scale_bytes(spec) * spec.num_layers / mib == whole
        assert block_scale_bytes(spec) < bank_bytes(spec, FP8) / 1900
        assert sum(sizes[0].values()) < sum(sizes[1].values())


def test_the_largest_shard_counts():
    spec = model([True] * 6, experts=7)
    assert shard_bytes(spec, "bfloat16", 3) * 7 == 3 * bank_bytes(spec, "bfloat16")
    found = plan(spec, 8, 8, 3, residency="sharded")
    assert found.device_bytes["shards"] == 6 * shard_bytes(spec, "bfloat16", 3)


# Properties.

SPECS = st.builds(
    model,
    st.lists(st.booleans(), min_size=1, max_size=12),
    experts=st.integers(2, 17),
    size=st.sampled_from([128, 512, 2048]),
)
BUDGETS = st.builds(
    Budget,
    device_bytes=st.integers(1 << 22, 4 * GIB),
    host_bytes=st.integers(0, 2 * GIB),
    ranks=st.integers(1, 5),
    kind=st.sampled_from(["cuda", "cpu"]),
)
PRECISIONS = st.sampled_from(["bfloat16", FP8])
WANTED = st.none() | st.integers(1, 1 << 18)


def planned(spec: ModelSpec, budget: Budget, bank_dtype: str, **pins) -> ResidencyPlan | None:
    try:
        return plan_residency(spec, budget, dtype="bfloat16", bank_dtype=bank_dtype, pins=Pins(**pins))
    except PlanError:
        return None


@settings(max_examples=EXAMPLES, deadline=None)
@given(SPECS, BUDGETS, PRECISIONS, WANTED)
def test_a_plan_keeps_to_the_budget_and_gives_every_sparse_layer_a_level(spec, budget, bank_dtype, wanted):
    found = planned(spec, budget, bank_dtype, max_sweep_tokens=wanted)
    if found is None:
        return
    assert found.peak_device_bytes <= budget.device_bytes
    assert found.peak_host_bytes <= budget.host_bytes
    assert [level is not None for level in found.levels] == [layer.sparse for layer in spec.layers]
    assert set(found.levels) <= {None, "resident", *(("offloaded",) if budget.ranks == 1 else ("sharded", "hybrid"))}
    assert wanted in (None, found.sweep.max_sweep_tokens)
    assert found.sweep.max_sweep_tokens <= found.largest_sweep_tokens <= found.largest_streamed_tokens


@settings(max_examples=EXAMPLES, deadline=None)
@given(SPECS, BUDGETS, PRECISIONS, st.integers(0, GIB), st.integers(0, GIB), WANTED)
def test_more_memory_is_never_worse(spec, budget, bank_dtype, more_device, more_host, wanted):
    less = planned(spec, budget, bank_dtype, max_sweep_tokens=wanted)
    larger = dataclasses.replace(
        budget, device_bytes=budget.device_bytes + more_device, host_bytes=budget.host_bytes + more_host
    )
    more = planned(spec, larger, bank_dtype, max_sweep_tokens=wanted)
    if less is not None:
        assert more is not None
        assert worth(more, wanted) >= worth(less, wanted)


def worth(found: ResidencyPlan, wanted: int | None) -> tuple[int, ...]:
    """What the rule prefers, in its order: a good sweep; everything resident, or in the devices' memory, beside it; a
    larger size; the best levels; more tokens; larger chunks.
    """
    kind, sweep = found.budget.kind, found.sweep
    sizes = sweep_sizes(kind, wanted, None)
    rows = min(sweep.chunk_rows, sizes[0][1])  # chunks grow last
    fitting = (s for s in sizes if s[1] == rows and s[0] <= sweep.max_sweep_tokens)
    size = next(fitting)  # the sweep has grown from this one
    host = found.count("hybrid") + found.count("offloaded")
    stage = 2 * (found.num_streamed == 0) + (host == 0)
    return (
        is_good(kind, size, wanted, None),
        stage,
        -sizes.index(size),
        -host,
        found.count("resident"),
        sweep.max_sweep_tokens,
        sweep.chunk_rows,
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(1, 200), st.data())
def test_streamed_layers_are_spread_evenly(total, data):
    streamed = data.draw(st.integers(0, total))
    hybrid = data.draw(st.integers(0, streamed))
    levels = levels_of(
        model([True] * total), {"resident": total - streamed, "sharded": streamed - hybrid, "hybrid": hybrid}
    )
    gaps = streamed_gaps(levels)
    assert len(gaps) == streamed
    assert sum(gaps) == (total if streamed else 0)
    assert not gaps or max(gaps) - min(gaps) <= 1
    among = [level for level in levels if level != "resident"]
    places = [index for index, level in enumerate(among) if level == "hybrid"]
    assert len(places) == hybrid
    assert {b - a for a, b in itertools.pairwise(places)} <= {
        streamed // max(hybrid, 1),
        -(-streamed // max(hybrid, 1)),
    }


def test_spread_by_hand():
    assert spread(7, 3) == [1, 3, 6]
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(5, 0) == []
    assert residency_map(levels_of(model([False, True, True, False, True]), {"resident": 2, "offloaded": 1})) == "-RR-O"


@settings(max_examples=EXAMPLES, deadline=None)
@given(SPECS, st.integers(0, GIB), st.sampled_from([1, 256, 4096]))
def test_the_largest_sweep_fits_and_one_token_more_does_not(spec, budget, chunk_rows):
    tokens = largest_sweep(spec, 2, budget, chunk_rows)
    if tokens:
        assert memory_plan(spec, 2, tokens, chunk_rows).num_bytes <= budget
    assert memory_plan(spec, 2, tokens + 1, chunk_rows).num_bytes > budget


def test_a_sweep_that_does_not_fit_beside_the_weights_is_refused():
    with pytest.raises(PlanError, match=r"a sweep of 1,000 tokens needs .* and there are 0.0 MiB"):
        plan_memory(model([True]), kind="cpu", element=2, budget=-5, wanted=1000)


# With a predicted speed.


def test_a_speed_decides_between_banks_and_tokens():
    spec = published("Qwen3-30B-A3B")

    def likes_tokens(levels, tokens, chunk_rows):
        return float(tokens)

    def likes_banks(levels, tokens, chunk_rows):
        return float(levels.count("resident"))

    large, small = (plan(spec, 24, 128, speed=speed) for speed in (likes_tokens, likes_banks))
    assert large.sweep.max_sweep_tokens > small.sweep.max_sweep_tokens
    assert large.count("resident") < small.count("resident")
    pinned = plan(spec, 24, 128, speed=likes_tokens, max_sweep_tokens=5000)
    assert pinned.sweep.max_sweep_tokens == 5000


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_cost_model_never_predicts_less_than_by_the_rule(ranks):
    spec = published("Qwen3-30B-A3B")
    predict = predictions(spec, estimated_profile("NVIDIA H200"), bank_dtype="bfloat16", ranks=ranks)
    speed = predicted_speed(predict)
    fast, ruled = plan(spec, 16, 128, ranks, speed=speed), plan(spec, 16, 128, ranks)
    rates = [speed(p.levels, p.sweep.max_sweep_tokens, p.sweep.chunk_rows) for p in (fast, ruled)]
    assert rates[0] >= 0.99 * rates[1]
    assert fast.peak_device_bytes <= 16 * GIB
