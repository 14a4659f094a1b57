"""Banks that are waited for behind a pruned last layer: what the plan does about them, and what it may never do."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.config import EngineConfig
from moe_prefill.core import ModelSpec
from moe_prefill.errors import PlanError
from moe_prefill.machine import MachineProfile, estimated_profile
from moe_prefill.memory import GIB
from moe_prefill.models import preset, spec_from_hf
from moe_prefill.residency import (
    MOST_EXPOSED,
    Budget,
    Pins,
    Predict,
    ResidencyPlan,
    exposed_share,
    plan_for,
    plan_residency,
    predictions,
)

EXAMPLES = 300 if os.environ.get("MOE_PREFILL_LONG") else 60


def shortened(layers: int) -> ModelSpec:
    spec = spec_from_hf(preset("Qwen3-30B-A3B"))
    return replace(spec, layers=spec.layers[:layers])


def with_host_link(bandwidth: float) -> MachineProfile:
    profile = estimated_profile("NVIDIA H200")
    return replace(profile, transfers={**profile.transfers, "host": bandwidth})


def forecast(predict: Predict, plan: ResidencyPlan) -> tuple[float, float]:
    """Tokens/s, and the part of a sweep that waits."""
    tokens = plan.sweep.max_sweep_tokens
    sweep = predict(plan.levels, tokens, plan.sweep.chunk_rows, plan.bank_buffers)
    return tokens / sweep.sweep_s, exposed_share(sweep)


def whole(hbm_gib: float, **settings) -> ResidencyPlan:
    config = EngineConfig(model="m", **settings)
    budget = Budget(device_bytes=int(hbm_gib * GIB), host_bytes=128 * GIB)
    return plan_for(config, shortened(48), budget, dtype="bfloat16", profile=estimated_profile("NVIDIA H200"))


def test_pinned_levels_get_a_third_buffer():
    plan = whole(12.5, residency="offloaded")
    assert (plan.map, plan.bank_buffers, plan.prefetch_depth) == ("O" * 48, 3, 2)
    assert plan.remedy is not None
    assert plan.remedy.startswith("one more bank buffer: 0.0% of a sweep")
    predict = predictions(shortened(48), estimated_profile("NVIDIA H200"), bank_dtype="bfloat16")
    two = predict(plan.levels, plan.sweep.max_sweep_tokens, plan.sweep.chunk_rows, 2)
    assert 0.005 < exposed_share(two) < 0.02
    assert forecast(predict, plan)[1] == 0


def test_where_the_depth_is_pinned_nothing_is_left_to_change():
    plan = whole(12, residency="offloaded", prefetch_depth=1)
    assert (plan.bank_buffers, plan.remedy) == (2, None)


@pytest.mark.parametrize(
    ("gpu", "ranks", "quantization"), [("NVIDIA A100", 1, "fp8"), ("NVIDIA L40S", 2, None), ("NVIDIA H100", 1, None)]
)
def test_a_card_of_which_a_rate_is_not_known_is_planned_without_a_forecast(gpu, ranks, quantization):
    """Float8 weights on a card without float8 units; two cards without a link between them; the last one is known."""
    config = EngineConfig(model="m", quantization=quantization, residency="offloaded" if ranks == 1 else "sharded")
    budget = Budget(device_bytes=60 * GIB, host_bytes=128 * GIB, ranks=ranks)
    plans = [
        plan_for(config, shortened(48), budget, dtype="bfloat16", profile=profile)
        for profile in (None, estimated_profile(gpu))
    ]
    assert plans[0].levels == plans[1].levels
    assert (plans[1].remedy is None) == (gpu != "NVIDIA H100")


def test_without_room_the_plan_stays():
    spec = shortened(48)
    least = whole(12, residency="offloaded", prefetch_depth=1)
    tight = replace(least.budget, device_bytes=least.peak_device_bytes)
    pins = Pins(residency="offloaded", max_sweep_tokens=least.sweep.max_sweep_tokens, chunk_rows=least.sweep.chunk_rows)
    predict = predictions(spec, estimated_profile("NVIDIA H200"), bank_dtype="bfloat16")
    plan = plan_residency(spec, tight, dtype="bfloat16", bank_dtype="bfloat16", pins=pins, predict=predict)
    assert (plan.bank_buffers, plan.remedy) == (2, None)


def test_a_resident_bank_is_cheaper_than_a_buffer():
    """A smaller sweep leaves room for one, and hides the other banks; the rule alone would take the larger sweep."""
    spec = shortened(48)
    predict = predictions(spec, with_host_link(78e9), bank_dtype="bfloat16")
    budget = Budget(device_bytes=int(9.6 * GIB), host_bytes=128 * GIB)
    before, after = (
        plan_residency(spec, budget, dtype="bfloat16", bank_dtype="bfloat16", predict=each) for each in (None, predict)
    )
    assert (before.map, before.remedy) == ("O" * 48, None)
    assert after.remedy is not None
    assert after.remedy.startswith("one more resident bank")
    assert (after.count("resident"), after.bank_buffers) == (1, 2)
    assert after.peak_host_bytes < before.peak_host_bytes


@pytest.mark.parametrize("ranks", [1, 2])
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    layers=st.integers(1, 10),
    device=st.integers(2 * GIB, 16 * GIB),
    host=st.integers(0, 16 * GIB),
    link=st.floats(10e9, 400e9),
    pinned=st.booleans(),
    tokens=st.none() | st.integers(1000, 1 << 17),
)
def test_a_remedy_keeps_to_the_budget_and_is_never_predicted_to_be_slower(
    ranks, layers, device, host, link, pinned, tokens
):
    spec, predict = shortened(layers), None
    profile = with_host_link(link)
    predict = predictions(spec, profile, bank_dtype="bfloat16", ranks=ranks)
    budget = Budget(device_bytes=device, host_bytes=host, ranks=ranks)
    residency = ("offloaded" if ranks == 1 else "hybrid") if pinned else None
    common = {
        "dtype": "bfloat16",
        "bank_dtype": "bfloat16",
        "pins": Pins(residency=residency, max_sweep_tokens=tokens),
    }
    try:
        before = plan_residency(spec, budget, **common)
    except PlanError:
        with pytest.raises(PlanError):
            plan_residency(spec, budget, **common, predict=predict)
        return
    after = plan_residency(spec, budget, **common, predict=predict)
    assert after.peak_device_bytes <= device
    assert after.peak_host_bytes <= before.peak_host_bytes <= host
    rates = [forecast(predict, plan) for plan in (before, after)]
    assert rates[1][0] >= rates[0][0] * (1 - 1e-9)
    if after.remedy is None:
        assert after == before
    else:
        assert rates[1][1] <= MOST_EXPOSED < rates[0][1]
        assert after.count("resident") >= before.count("resident")
        assert after.longest_request == before.longest_request
        assert not pinned or after.levels == before.levels
        assert tokens in (None, after.sweep.max_sweep_tokens)


# Larger chunks for banks.


@pytest.mark.parametrize(("host_gib", "rows"), [(112, 32768), (128, 65536), (104, 16384)])
def test_banks_that_stream_anyway_make_room_for_larger_chunks(host_gib, rows):
    """Qwen3-235B-A22B on one H200: the host's memory decides how many banks can leave the device."""
    spec = spec_from_hf(preset("Qwen3-235B-A22B"))
    config = EngineConfig(model="m", quantization="fp8", max_sweep_tokens=65536)
    budget = Budget(device_bytes=139 * GIB, host_bytes=host_gib * GIB)
    profile = estimated_profile("NVIDIA H200")
    plan = plan_for(config, spec, budget, dtype="bfloat16", profile=profile)
    ruled = plan_for(config, spec, budget, dtype="bfloat16")
    assert plan.sweep.chunk_rows == rows
    assert plan.count("resident") <= ruled.count("resident")
    predict = predictions(spec, profile, bank_dtype="float8_e4m3fn")
    (mine, exposed), (theirs, _) = forecast(predict, plan), forecast(predict, ruled)
    assert exposed <= MOST_EXPOSED
    assert mine >= (1.01 * theirs if rows > 16384 else theirs)


def test_no_bank_leaves_the_device_for_chunks_where_all_fit_or_levels_or_chunks_are_given():
    spec = spec_from_hf(preset("Qwen3-235B-A22B"))
    budget = Budget(device_bytes=139 * GIB, host_bytes=128 * GIB)
    profile = estimated_profile("NVIDIA H200")
    config = EngineConfig(model="m", quantization="fp8", max_sweep_tokens=65536)
    for given_rows in (4096, 16384):
        rows = replace(config, chunk_rows=given_rows)
        assert plan_for(rows, spec, budget, dtype="bfloat16", profile=profile).sweep.chunk_rows == given_rows
    pinned = replace(config, residency="resident:49,offloaded:45")
    assert plan_for(pinned, spec, budget, dtype="bfloat16", profile=profile).count("resident") == 49
    small = shortened(48)
    for gib in range(60, 80, 2):
        plan = plan_for(
            EngineConfig(model="m"), small, replace(budget, device_bytes=gib * GIB), dtype="bfloat16", profile=profile
        )
        ruled = plan_for(EngineConfig(model="m"), small, replace(budget, device_bytes=gib * GIB), dtype="bfloat16")
        assert plan.count("resident") == ruled.count("resident") or plan.count("offloaded") > 0
        if ruled.count("resident") == 48:
            assert plan.count("resident") == 48
