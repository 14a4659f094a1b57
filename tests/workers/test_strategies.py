"""The baselines behind the same protocol: close to one engine alone, through the loss of a rank too."""

from __future__ import annotations

import os

import numpy as np
import pytest
import transformers

from moe_prefill.engine import build_engine
from moe_prefill.errors import UsageError
from moe_prefill.workers import GroupEngine, build_scoring
from tests.workers.helpers import harm_later, wait_for, workers
from tests.workers.test_real_engine import TINY, config_of, requests_of

STRATEGIES = ("dp+ep", "dp+tp", "tp+ep", "tp+tp", "pp+pp")
SHORT = ("dp+ep", "pp+pp")  # one that goes in rounds, one whose ranks differ most; `make test-long` runs all


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    config = transformers.Qwen3MoeConfig(**TINY | {"num_experts": 6, "num_hidden_layers": 4, "initializer_range": 0.1})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("strategy", STRATEGIES if os.environ.get("MOE_PREFILL_LONG") else SHORT)
def test_a_strategy_in_processes_answers_like_one_engine(model, strategy):
    requests = requests_of(4, 97, 200)
    expected = build_engine(config_of(model, max_sweep_tokens=400)).score(requests)
    engine = GroupEngine(config_of(model, max_sweep_tokens=400, strategy=strategy, gpus=2))
    harm_later(engine, 0, sweeps=2)
    for want, got in zip(expected, engine.score(requests), strict=True):
        np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-4)
        assert (got.log_z is None) == (want.log_z is None)
    assert engine.stats.requests == len(requests)
    assert wait_for(lambda: engine.stats.restarts == 1)
    engine.close()
    assert workers() == []


def test_a_strategy_needs_processes(model):
    with pytest.raises(UsageError, match=r"--strategy dp\+ep splits the model over several GPUs; give --gpus N"):
        build_scoring(config_of(model, strategy="dp+ep"))
