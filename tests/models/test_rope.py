"""Rotary frequencies against transformers' own functions, on random parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from moe_prefill.models import spec_from_hf
from moe_prefill.models.rope import inverse_frequencies

dims = st.sampled_from([4, 16, 64, 128])
thetas = st.sampled_from([500.0, 10000.0, 1e6, 5e6])
factors = st.floats(1.0, 40.0)
positions = st.integers(64, 300_000)
maybe = st.none() | st.floats(0.1, 3.0)


def reference_config(dim, theta, max_positions, **rope):
    return Qwen3MoeConfig(
        head_dim=dim, max_position_embeddings=max_positions, rope_parameters={"rope_theta": theta, **rope}
    )


def check(config, length=None):
    spec = spec_from_hf(config.to_dict())
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        want, want_factor = Qwen3MoeRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        grown = length is not None and length > config.max_position_embeddings
        seq_len = torch.tensor(length) if grown else None  # as the reference's forward calls it
        want, want_factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=seq_len)
    got, factor = inverse_frequencies(spec.rope, length)
    assert got.dtype == torch.float32
    assert got.shape == (spec.rope.dim // 2,)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    assert factor == pytest.approx(want_factor, rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(dims, thetas)
def test_default(dim, theta):
    check(reference_config(dim, theta, 4096, rope_type="default"))


@settings(deadline=None, max_examples=30)
@given(dims, thetas, factors)
def test_linear(dim, theta, factor):
    check(reference_config(dim, theta, 4096, rope_type="linear", factor=factor))


@settings(deadline=None, max_examples=60)
@given(dims, thetas, factors, positions, st.integers(1, 1_000_000))
def test_dynamic(dim, theta, factor, max_positions, length):
    check(reference_config(dim, theta, max_positions, rope_type="dynamic", factor=factor), length)


@settings(deadline=None, max_examples=150)
@given(dims, thetas, factors, positions, maybe, maybe, maybe, st.booleans(), st.floats(8, 64), st.floats(0.5, 4))
def test_yarn(dim, theta, factor, original, attention_factor, mscale, mscale_all, truncate, fast, slow):
    optional = {"attention_factor": attention_factor, "mscale": mscale, "mscale_all_dim": mscale_all}
    check(
        reference_config(
            dim,
            theta,
            4 * original,
            rope_type="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=fast,
            beta_slow=slow,
            truncate=truncate,
            **{name: value for name, value in optional.items() if value is not None},
        )
    )


@settings(deadline=None, max_examples=60)
@given(dims, thetas, factors, positions, st.floats(0.5, 2.0), st.floats(1.1, 8.0))
def test_llama3(dim, theta, factor, original, low, ratio):
    check(
        reference_config(
            dim,
            theta,
            8 * original,
            rope_type="llama3",
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=low * ratio,
        )
    )


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_dynamic_equals_one_forward_of_that_length(length):
    config = reference_config(16, 10000.0, 64, rope_type="dynamic", factor=4.0)
    module = Qwen3MoeRotaryEmbedding(config)
    cos, _ = module(torch.zeros(1), torch.arange(length)[None])
    frequencies, _ = inverse_frequencies(spec_from_hf(config.to_dict()).rope, length)
    angles = torch.arange(length)[:, None] * frequencies
    torch.testing.assert_close(cos[0, :, :8], angles.cos(), rtol=0, atol=1e-6)
