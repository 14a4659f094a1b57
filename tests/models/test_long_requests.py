"""Requests on both sides of the original context: logits equal those of transformers, whatever else is in the sweep."""

import numpy as np
import pytest

from tests import reference
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

ORIGINAL = 24  # tokens; the longest request has 60
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def long_requests(seed: int) -> list[np.ndarray]:
    """Prefixes are shared across the original context, and one request ends just there."""
    sequences = random_requests(seed, count=9)
    longest = max(sequences, key=len)
    return [*sequences, longest[:ORIGINAL], longest[: ORIGINAL + 1]]


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_on_both_sides_of_the_original_context(monkeypatch, family, kind):
    random_config = reference.random_config

    def config(family, seed):
        made = random_config(family, seed)
        made.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
        made.max_position_embeddings = 4 * ORIGINAL if kind == "llama3" else ORIGINAL
        return made

    monkeypatch.setattr(reference, "random_config", config)
    model = random_model(family, 77)
    drawn = map(long_requests, range(20))
    sequences = next(d for d in drawn if min(smallest_routing_gap(model, tokens) for tokens in d) > 1e-5)
    lengths = sorted(map(len, sequences))
    assert lengths[0] < ORIGINAL < lengths[-2] < lengths[-1], lengths
    expected = [reference_logits(model, tokens) for tokens in sequences]
    converted = convert(model)
    for options in ({"sharing": "off"}, {"sharing": "force", "chunk_rows": 11}):
        results = engine_of(converted, **options).score([everything(tokens) for tokens in sequences])
        for tokens, want, result in zip(sequences, expected, results, strict=True):
            got = result.logits.reshape(want.shape)
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), (options, len(tokens))
