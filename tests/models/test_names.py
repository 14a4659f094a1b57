"""Names against the reference's own parameters, and the inverse of placing."""

import pytest
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_prefill.models import family, spec_from_hf
from moe_prefill.models.common.names import Placement, ignorer, required
from moe_prefill.shapes import bank_shapes, slot_shapes

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 1,
    "intermediate_size": 6,
    "pad_token_id": None,
}
MODELS = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts": 3, "attention_bias": True}),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {"num_experts": 3, "mlp_only_layers": [0]}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 3}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 3}),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_reference_fill_every_slot(name):
    config_class, model_class, more = MODELS[name]
    config = config_class(**SMALL, **more)
    spec = spec_from_hf(config.to_dict())
    parameters = dict(model_class(config).named_parameters())
    place = family(name).placer(spec, parameters)
    shapes = slot_shapes(spec) | bank_shapes(spec)
    rows = dict.fromkeys(shapes, 0)
    for parameter, tensor in parameters.items():
        where = place(parameter)
        assert where is not None, parameter
        rows[where.slot] += tensor.shape[0]
    assert rows == {slot: shape[0] for slot, shape in shapes.items()}


@pytest.mark.parametrize("name", MODELS)
def test_required_names_place_where_they_say(name):
    config_class, _, more = MODELS[name]
    spec = spec_from_hf(config_class(**SMALL, **more).to_dict())
    place = family(name).placer(spec, ())
    for tensor, where in required(spec):
        assert place(tensor) == where


def test_published_names_of_mixtral():
    spec = spec_from_hf(MixtralConfig(**SMALL, num_local_experts=3).to_dict())
    place = family("mixtral").placer(spec, ())
    block = "model.layers.1.block_sparse_moe"
    assert place(f"{block}.gate.weight") == Placement("layers.1.router")
    assert place(f"{block}.experts.2.w1.weight") == Placement("banks.1.gate_up", 0, 6, 2)
    assert place(f"{block}.experts.2.w3.weight") == Placement("banks.1.gate_up", 6, 6, 2)
    assert place(f"{block}.experts.2.w2.weight") == Placement("banks.1.down", 0, None, 2)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.3.up_proj.weight",  # there are three
        "model.layers.0.mlp.experts.01.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.qweight",
        "model.layers.00.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.embed_positions.weight",
        "base_model.model.lm_head.weight",
    ],
)
def test_unknown_names_have_no_place(name):
    spec = spec_from_hf(OlmoeConfig(**SMALL, num_experts=3).to_dict())
    assert family("olmoe").placer(spec, ())(name) is None
    assert not ignorer(spec)(name)


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_rotary_tables_may_be_left_over(name):
    assert ignorer(spec_from_hf({"model_type": "olmoe"}))(name)
