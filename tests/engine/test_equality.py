"""float32 logits equal those of transformers: four families, adversarial configurations, with and without sharing."""

import os

import numpy as np
import pytest
import torch

from tests.reference import (
    FAMILIES,
    convert,
    engine_of,
    everything,
    random_model,
    random_requests,
    reference_logits,
    smallest_routing_gap,
)

# A family; 48 configurations in all. `make test-long` draws more of the same.
SEEDS = 40 if os.environ.get("MOE_PREFILL_LONG") else 12
REDRAWN: list[str] = []


def comparable_requests(model, seed: int) -> list[np.ndarray]:
    """Requests whose routing is decided by more than rounding; the redrawn ones are counted."""
    for attempt in range(20):
        sequences = random_requests(1000 * attempt + seed)
        if min(smallest_routing_gap(model, tokens) for tokens in sequences) > 1e-5:
            return sequences
        REDRAWN.append(f"{model.config.model_type}-{seed}")
    raise AssertionError("no comparable requests in 20 draws")


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, seed):
    model = random_model(family, seed)
    converted = convert(model)
    sequences = comparable_requests(model, seed)
    expected = [reference_logits(model, tokens) for tokens in sequences]
    for options in (
        {"sharing": "off"},
        {"sharing": "force"},
        {"sharing": "force", "chunk_rows": 7},
        {"sharing": "auto", "max_sweep_tokens": 100, "chunk_rows": 33},
        {"sharing": "off", "prune_last": False},
    ):
        engine = engine_of(converted, **options)
        for tokens, want, result in zip(
            sequences, expected, engine.score([everything(t) for t in sequences]), strict=True
        ):
            got = result.logits.reshape(len(tokens), -1)
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), (family, seed, options)
            log_z = torch.as_tensor(want).logsumexp(-1).numpy()
            np.testing.assert_allclose(result.log_z, log_z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_does_not_depend_on_the_batch(family):
    model = random_model(family, 3)
    converted = convert(model)
    sequences = comparable_requests(model, 3)
    together = engine_of(converted, sharing="force").score([everything(t) for t in sequences])
    for tokens, result in zip(sequences, together, strict=True):
        (alone,) = engine_of(converted).score([everything(tokens)])
        assert np.abs(alone.logits - result.logits).max() <= 1e-4 * np.abs(alone.logits).max()


def test_the_same_list_gives_the_same_bits():
    converted = convert(random_model("qwen3_moe", 1))
    requests = [everything(t) for t in random_requests(5, count=20)]
    one = engine_of(converted, max_sweep_tokens=120).score(requests)
    two = engine_of(converted, max_sweep_tokens=120).score(requests)
    assert all((a.logits == b.logits).all() for a, b in zip(one, two, strict=True))
