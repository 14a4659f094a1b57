"""Mixtral's config."""

from __future__ import annotations

from ...core import ModelSpec
from ..common.config import Windows, decoder_spec
from ..common.fields import Config, Fields

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "num_experts": 8,
}


def spec_from_config(config: Config) -> ModelSpec:
    fields = Fields(config, "mixtral", DEFAULTS)
    for name, value in {"attention_bias": False, "norm_topk_prob": True}.items():
        fields.fixed(name, value)
    return decoder_spec(
        fields,
        windows=_windows,
        expert_size="intermediate_size",
        default_theta=1_000_000.0,
        norm_topk_prob=True,
        router_weights_float32=True,
    )


def _windows(fields: Fields, num_layers: int) -> Windows:
    return [fields.optional_integer("sliding_window")] * num_layers
