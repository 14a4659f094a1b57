"""OLMoE's config."""

from __future__ import annotations

from ...core import ModelSpec
from ...errors import ModelError
from ..common.config import decoder_spec, no_windows
from ..common.fields import Config, Fields

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
}


def spec_from_config(config: Config) -> ModelSpec:
    fields = Fields(config, "olmoe", DEFAULTS)
    bias = fields.flag("attention_bias")
    spec = decoder_spec(
        fields,
        windows=no_windows,
        expert_size="intermediate_size",
        qk_norm="full",
        qkv_bias=bias,
        out_bias=bias,
        clip_qkv=fields.optional_number("clip_qkv"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
    )
    if spec.num_heads * spec.head_dim != spec.hidden_size:
        # The reference's full-width norms have hidden_size channels, so another query width cannot be computed.
        raise ModelError(
            f"olmoe: head_dim {spec.head_dim} times num_attention_heads {spec.num_heads} must be hidden_size "
            f"{spec.hidden_size}."
        )
    return spec
