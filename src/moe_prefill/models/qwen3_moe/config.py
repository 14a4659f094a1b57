"""Qwen3-MoE's config."""

from __future__ import annotations

from ...core import ModelSpec
from ..common.config import Windows, decoder_spec, sparse_layers
from ..common.fields import Config, Fields

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}


def spec_from_config(config: Config) -> ModelSpec:
    fields = Fields(config, "qwen3_moe", DEFAULTS)
    bias = fields.flag("attention_bias")
    return decoder_spec(
        fields,
        windows=_windows,
        sparse=sparse_layers(fields),
        expert_size="moe_intermediate_size",
        dense_size="intermediate_size",
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        norm_topk_prob=fields.flag("norm_topk_prob"),
    )


def _windows(fields: Fields, num_layers: int) -> Windows:
    """One window for all layers. ``max_window_layers`` stands in published configs and is not read by the reference."""
    fields.skip("max_window_layers", "sliding_window")
    return [fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None] * num_layers
