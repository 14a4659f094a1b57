"""The engine on a GPU: equal to transformers in float32, close in bfloat16, deterministic, and silent towards the
host.
"""

import numpy as np
import pytest
import torch

from moe_prefill.engine.local import LocalEngine
from moe_prefill.engine.sweep import run_sweep
from moe_prefill.experts import ResidentBanks
from moe_prefill.memory import plan_memory
from moe_prefill.models.weights import ExpertBank, weights_from_slots
from tests.reference import (
    FAMILIES,
    Converted,
    convert,
    everything,
    random_model,
    random_requests,
    reference_logits,
    smallest_routing_gap,
)

pytestmark = pytest.mark.gpu


def gpu_engine(converted: Converted, dtype=torch.float32, **options) -> LocalEngine:
    device = torch.device("cuda", 0)
    slots = {name: tensor.to(device, dtype) for name, tensor in converted.slots.items()}
    banks = [
        None if bank is None else ExpertBank(bank.gate_up.to(device, dtype), bank.down.to(device, dtype))
        for bank in converted.banks
    ]
    memory = plan_memory(
        converted.spec,
        kind="cuda",
        element=dtype.itemsize,
        budget=4 << 30,
        wanted=options.pop("max_sweep_tokens", None),
    )
    weights = weights_from_slots(converted.spec, slots)
    return LocalEngine(converted.spec, weights, ResidentBanks(banks), memory, device=device, **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_transformers(family, seed):
    model = random_model(family, seed)
    sequences = random_requests(seed)
    if min(smallest_routing_gap(model, tokens) for tokens in sequences) <= 1e-5:
        pytest.skip("routing decided by rounding in this draw")
    expected = [reference_logits(model, tokens) for tokens in sequences]
    converted = convert(model)
    for sharing in ("off", "force"):
        engine = gpu_engine(converted, sharing=sharing)
        for tokens, want, result in zip(
            sequences, expected, engine.score([everything(t) for t in sequences]), strict=True
        ):
            got = result.logits.reshape(len(tokens), -1)
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), (family, seed, sharing)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(family):
    model = random_model(family, 2)
    sequences = random_requests(2, count=12)
    exact = [reference_logits(model, tokens) for tokens in sequences]
    low = model.to(torch.bfloat16)
    theirs = [reference_logits(low, tokens) for tokens in sequences]
    engine = gpu_engine(convert(low), torch.bfloat16, sharing="force")
    ours = [
        r.logits.reshape(len(t), -1)
        for t, r in zip(sequences, engine.score([everything(t) for t in sequences]), strict=True)
    ]
    error = lambda found: np.median(np.concatenate([np.abs(a - b).ravel() for a, b in zip(found, exact, strict=True)]))  # noqa: E731
    assert error(ours) <= 1.5 * error(theirs), (family, error(ours), error(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_never_waits_for_the_host_and_repeats_its_bits(dtype):
    converted = convert(random_model("qwen3_moe", 5))
    engine = gpu_engine(converted, dtype, sharing="force")
    requests = [everything(t) for t in random_requests(7, count=30)]
    plan = engine.plan(requests)
    results = []
    with torch.inference_mode():
        run_sweep(plan, engine._decoder, engine._weights, engine._banks)  # kernels compile here
        torch.cuda.synchronize()
        side, block = torch.cuda.Stream(), torch.empty(64 << 20, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                with torch.cuda.stream(side):  # a copy beside it, as an expert stream would have
                    block[: 32 << 20].copy_(block[32 << 20 :], non_blocking=True)
                results.append(run_sweep(plan, engine._decoder, engine._weights, engine._banks).vocabulary.logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(results[0], other) for other in results[1:])
