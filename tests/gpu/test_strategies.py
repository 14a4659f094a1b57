"""The strategies over NCCL, a GPU for each rank, equal to the plain engine on the CPU. One rank runs the same code."""

import numpy as np
import pytest
import torch

from moe_prefill.strategies import NAMES
from tests.reference import FAMILIES, convert, everything, random_model
from tests.strategies import launch
from tests.strategies.test_strategies import comparable_requests, divided, plain_engine, possible_seeds
from tests.strategies.worker import Case

pytestmark = pytest.mark.gpu
SIZES = [size for size in (1, 2, 4) if size <= torch.cuda.device_count()]


@pytest.mark.parametrize("size", SIZES)
def test_strategies_over_nccl_equal_the_plain_engine(size, tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    models, sequences, cases = {}, {}, []
    for strategy in NAMES:
        for family in FAMILIES:
            seed = next(possible_seeds(family, strategy, size))
            key = f"{family}-{seed}"
            if key not in models:
                model = random_model(family, seed)
                models[key], sequences[key] = convert(model), comparable_requests(model, seed)
            requests = [everything(tokens) for tokens in sequences[key]]
            given = divided(requests, strategy, size) if size > 1 else [requests]
            cases.append(Case(key, strategy, size, given, sharing="force", chunk_rows=33, sweep_tokens=150))
    runs = launch.run(tmp_path, cases, {key: launch.in_memory(model) for key, model in models.items()}, "cuda")
    for case, outcomes in zip(cases, runs, strict=True):
        plain = plain_engine(models[case.model], None)
        for requests, outcome in zip(case.requests, outcomes, strict=True):
            for want, got in zip(plain.score(requests), outcome.results, strict=True):
                assert np.abs(got.logits - want.logits).max() <= 1e-4 * np.abs(want.logits).max(), case
