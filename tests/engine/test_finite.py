"""``--check-finite``: the tensor or the part of a layer that first gives NaN or infinity is named."""

import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.engine import build_engine
from moe_prefill.errors import ModelError, UsageError
from tests.checkpoint import float8_models
from tests.reference import random_model

REQUESTS = [AtomicRequest.candidates(np.arange(1, n, dtype=np.int32), [3, 5]) for n in (4, 9, 20)]
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def directory(tmp_path):
    model = random_model("qwen3_moe", 0)
    assert model.config.num_hidden_layers > 1
    model.save_pretrained(tmp_path, save_original_format=True)
    return tmp_path


def change(directory, **changes):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, edit in changes.items():
        edit(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def engine_on(directory, **settings):
    return build_engine(EngineConfig(model=str(directory), device="cpu", threads=1, dtype="float32", **settings))


def logits(directory, **settings):
    engine = engine_on(directory, **settings)
    try:
        return np.stack([result.logits for result in engine.score(REQUESTS)])
    finally:
        engine.close()


def test_weights_that_are_not_finite_are_named(directory):
    change(directory, **{DOWN: lambda t: t[2, 1:3].fill_(math.nan), K: lambda t: t[0, :1].fill_(-math.inf)})
    assert not np.isfinite(logits(directory)).all(), "without the mode, rows fail one by one"
    with pytest.raises(ModelError) as met:
        engine_on(directory, check_finite=True)
    assert "2 tensors hold values that are not finite" in str(met.value)
    assert f"{DOWN} (2 values)" in str(met.value)
    assert f"{K} (1 values)" in str(met.value)


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_the_same_with_float8(directory, quantization):
    change(directory, **{DOWN: lambda t: t[2, 1:3].fill_(math.nan)})
    with pytest.raises(ModelError, match=rf"1 tensors .*{DOWN}"):
        engine_on(directory, check_finite=True, quantization=quantization)


def test_a_value_of_a_float8_checkpoint(tmp_path):
    _, _ = float8_models.save(tmp_path)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    change(tmp_path, **{name: lambda t: t.view(torch.uint8)[5, 7:8].fill_(0x7F)})
    with pytest.raises(ModelError, match=rf"1 tensors .*{name}"):
        engine_on(tmp_path, check_finite=True)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("model.layers.1.mlp.experts.{e}.down_proj.weight", "layer 1: experts or feed-forward"),
        ("model.layers.0.self_attn.o_proj.weight", "layer 0: output projection"),
        ("model.layers.1.self_attn.k_norm.weight", "layer 1: keys and values"),
    ],
)
def test_finite_weights_that_overflow(directory, name, fault, caplog):
    stored = load_file(directory / "model.safetensors")
    names = [name.format(e=expert) for expert in range(99) if name.format(e=expert) in stored]
    change(directory, **{each: lambda t: t.copy_(t.sign() * 3e38) for each in names})
    with caplog.at_level(logging.ERROR):
        assert not np.isfinite(logits(directory, check_finite=True)).all()
    assert f"NaN or infinity in a sweep of 3 requests, first in {fault}" in caplog.text


def test_nothing_is_said_and_nothing_changes_where_all_is_finite(directory, caplog):
    with caplog.at_level(logging.ERROR):
        assert np.array_equal(logits(directory, check_finite=True), logits(directory))
    assert not caplog.text


def test_other_strategies_are_not_looked_into():
    with pytest.raises(UsageError, match="check_finite"):
        EngineConfig(model="m", strategy="tp+tp", check_finite=True)
