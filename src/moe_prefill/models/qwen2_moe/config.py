"""Qwen2-MoE's config."""

from __future__ import annotations

from ...core import ModelSpec
from ..common.config import Windows, decoder_spec, sparse_layers
from ..common.fields import Config, Fields, refused

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "qkv_bias": True,
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def spec_from_config(config: Config) -> ModelSpec:
    fields = Fields(config, "qwen2_moe", DEFAULTS)
    return decoder_spec(
        fields,
        windows=_windows,
        sparse=sparse_layers(fields),
        expert_size="moe_intermediate_size",
        dense_size="intermediate_size",
        shared_size=fields.integer("shared_expert_intermediate_size"),
        qkv_bias=fields.flag("qkv_bias"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
    )


def _windows(fields: Fields, num_layers: int) -> Windows:
    """The windows of transformers 5: ``layer_types`` where given, else every other layer below ``max_window_layers``.

    Releases of transformers 4 disagreed about ``max_window_layers`` (layers from it on, or below it, with one attention
    kernel only or with all). No published checkpoint turns windows on, so the current reference decides.
    """
    sliding, limit = fields.flag("use_sliding_window"), fields.integer("max_window_layers", minimum=0)
    types = fields.raw("layer_types")
    if types is None:
        types = [_LAYER_TYPES[sliding and i % 2 == 0 and i < limit] for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not set(map(str, types)) <= set(_LAYER_TYPES):
        raise refused(fields.family, "layer_types", types, f"{num_layers} entries of {' or '.join(_LAYER_TYPES)}")
    fields.skip("sliding_window")
    if "sliding_attention" not in types:
        return [None] * num_layers
    if not sliding:
        raise refused(fields.family, "use_sliding_window", False, "true when layer_types names sliding_attention")
    window = fields.optional_integer("sliding_window")
    if window is None:
        raise refused(fields.family, "sliding_window", None, "a whole number when use_sliding_window is true")
    return [window if kind == "sliding_attention" else None for kind in types]
