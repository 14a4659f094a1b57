"""Configs in the forms of transformers 4 and 5 become specs; what cannot be computed is refused by name."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moe_prefill.errors import ModelError
from moe_prefill.models import FAMILIES, preset, preset_names, spec_from_hf

CLASSES = {"qwen3_moe": Qwen3MoeConfig, "qwen2_moe": Qwen2MoeConfig, "mixtral": MixtralConfig, "olmoe": OlmoeConfig}


def saved(config, directory):
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def check_against(spec, config):
    """Every number of the spec against what the reference's classes read when they build their modules."""
    heads = config.num_attention_heads
    assert spec.vocab_size == config.vocab_size
    assert (spec.hidden_size, spec.num_heads) == (config.hidden_size, heads)
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // heads)
    assert (spec.num_experts, spec.top_k) == (config.num_experts, config.num_experts_per_tok)
    assert spec.expert_size == getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert spec.norm_eps == config.rms_norm_eps
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.rope.kind == config.rope_parameters["rope_type"]
    assert spec.norm_topk_prob == getattr(config, "norm_topk_prob", True)
    assert spec.qkv_bias == getattr(config, "attention_bias", getattr(config, "qkv_bias", False))
    assert spec.out_bias == getattr(config, "attention_bias", False)
    assert spec.clip_qkv == getattr(config, "clip_qkv", None)
    assert spec.shared_size == getattr(config, "shared_expert_intermediate_size", 0)
    for index, layer in enumerate(spec.layers):
        dense = index in getattr(config, "mlp_only_layers", []) or (index + 1) % getattr(
            config, "decoder_sparse_step", 1
        )
        assert layer.sparse == (not dense)
        types = getattr(config, "layer_types", None)
        sliding = types is None or types[index] == "sliding_attention"
        assert layer.window == (getattr(config, "sliding_window", None) if sliding else None)


@st.composite
def configs(draw):
    name = draw(st.sampled_from(sorted(CLASSES)))
    groups, per_group, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 16]))
    layers, experts = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    fields = {
        "vocab_size": draw(st.integers(10, 100)),
        "hidden_size": groups * per_group * head_dim,
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "intermediate_size": draw(st.integers(1, 40)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_word_embeddings": draw(st.booleans()),
        "num_local_experts" if name == "mixtral" else "num_experts": experts,
        "rope_parameters": draw(
            st.sampled_from(
                [
                    {"rope_type": "default", "rope_theta": 5e5},
                    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
                    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4},
                ]
            )
        ),
    }
    if name.startswith("qwen"):
        fields |= {
            "moe_intermediate_size": draw(st.integers(1, 40)),
            "decoder_sparse_step": draw(st.integers(1, 3)),
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True)),
            "norm_topk_prob": draw(st.booleans()),
            "use_sliding_window": draw(st.booleans()),
            "sliding_window": draw(st.integers(1, 50)),
        }
    if name == "qwen2_moe":
        fields |= {"qkv_bias": draw(st.booleans()), "max_window_layers": draw(st.integers(0, 6))}
        fields["shared_expert_intermediate_size"] = draw(st.integers(1, 40))
    if name in ("qwen3_moe", "olmoe"):
        fields["attention_bias"] = draw(st.booleans())
    if name in ("qwen3_moe", "mixtral"):
        fields["head_dim"] = draw(st.sampled_from([4, 6, 32]))
    if name == "mixtral":
        fields["sliding_window"] = draw(st.none() | st.integers(1, 50))
    if name == "olmoe":
        fields |= {"clip_qkv": draw(st.none() | st.floats(0.5, 8)), "norm_topk_prob": draw(st.booleans())}
    return CLASSES[name](**fields)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs())
def test_saved_by_transformers(tmp_path, config):
    check_against(spec_from_hf(saved(config, tmp_path)), config)


@pytest.mark.parametrize("name", CLASSES)
def test_missing_fields_have_the_references_defaults(name):
    spec, config = spec_from_hf({"model_type": name}), CLASSES[name]()
    check_against(spec, config)
    assert spec.max_positions == config.max_position_embeddings
    assert spec.dtype == "float32"


QWEN3_OLD = {
    "_name_or_path": "someone/finetuned",
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "modeling.Other"},
    "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "unsloth_version": "2025.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_old_form_equals_the_preset():
    spec = spec_from_hf(QWEN3_OLD)
    assert spec == spec_from_hf(preset("qwen/QWEN3-30b-a3b"))
    assert (spec.head_dim, spec.qk_norm, spec.rope.theta, spec.dtype) == (128, "head", 1e6, "bfloat16")


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("change", "kind", "factor", "original", "longest"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear", 2, 40960, 81920),
        ({"rope_scaling": {"type": "dynamic", "factor": 3.0}}, "dynamic", 3, 40960, 122880),
        ({"rope_scaling": {"rope_type": "yarn", **YARN}}, "yarn", 4, 32768, 131072),
        ({"rope_scaling": {"type": "yarn", "factor": None, **YARN} | {"factor": None}}, "yarn", 1.25, 32768, 40960),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn", 2, 40960, 81920),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 8192},
            "yarn",
            4,
            8192,
            40960,
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, **YARN}}, "yarn", 4, 32768, 131072),
        ({"rope_scaling": {"type": "default"}}, "default", 1, 0, 40960),
        ({"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2}}, "linear", 2, 40960, 81920),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 8192,
                }
            },
            "llama3",
            8,
            8192,
            40960,
        ),
    ],
)
def test_rope_forms(change, kind, factor, original, longest):
    spec = spec_from_hf(QWEN3_OLD | change)
    rope = spec.rope
    assert (rope.kind, rope.factor, rope.original_max_positions, rope.theta) == (kind, factor, original, 1e6)
    assert spec.max_positions == longest


def test_theta_inside_wins_over_theta_beside():
    assert spec_from_hf(QWEN3_OLD | {"rope_parameters": {"rope_theta": 5e6}}).rope.theta == 5e6


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"model_type": "llama"}, ["'llama'", "qwen3_moe (Qwen3MoeForCausalLM)", "olmoe"]),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, ["Qwen3MoeForSequenceClassification"]),
        ({"model_type": None, "architectures": ["X"]}, ["no model_type", "X"]),
        ({"hidden_act": "gelu"}, ["'hidden_act' is 'gelu'", "'silu'"]),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ["quantization_config", "'gptq'", "unquantised"],
        ),
        ({"num_experts_per_tok": 200}, ["num_experts_per_tok is 200", "128 experts"]),
        ({"num_experts": 0}, ["num_experts", "0"]),
        ({"num_local_experts": 64}, ["disagree", "128", "64"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads 32", "num_key_value_heads 5"]),
        ({"hidden_size": -2048}, ["'hidden_size' is -2048"]),
        ({"hidden_size": "2048"}, ["'hidden_size' is '2048'"]),
        ({"num_hidden_layers": True}, ["'num_hidden_layers' is True"]),
        ({"vocab_size": 10.5}, ["'vocab_size' is 10.5"]),
        ({"rms_norm_eps": 0}, ["'rms_norm_eps' is 0"]),
        ({"rms_norm_eps": float("nan")}, ["'rms_norm_eps' is nan"]),
        ({"norm_topk_prob": "yes"}, ["'norm_topk_prob' is 'yes'", "true or false"]),
        ({"head_dim": 127}, ["head_dim is 127", "even"]),
        ({"head_dim": None, "hidden_size": 2050}, ["2050", "32", "head_dim"]),
        ({"mlp_only_layers": [48]}, ["'mlp_only_layers'", "from 0 to 47"]),
        ({"torch_dtype": "float64"}, ["'dtype' is 'float64'", "bfloat16"]),
        ({"is_causal": False}, ["'is_causal' is False"]),
        ({"is_encoder_decoder": True}, ["'is_encoder_decoder' is True"]),
        ({"attention_sinks": 4}, ["'attention_sinks' is 4", "delete it from config.json"]),
        ({"layer_types": ["sliding_attention"] * 48}, ["'layer_types'"]),
        ({"partial_rotary_factor": 0.5}, ["'partial_rotary_factor' is 0.5"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, ["'rope_type' is 'longrope'", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "'factor' is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, ["'factor' is -1"]),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, ["'mrope_section'"]),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, ["'full_attention'"]),
        ({"rope_scaling": "yarn"}, ["'rope_scaling' is 'yarn'"]),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}},
            ["high_freq_factor 1", "low_freq_factor 4"],
        ),
        ({"rope_theta": "big"}, ["'rope_theta' is 'big'"]),
    ],
)
def test_refused_by_name(change, texts):
    with pytest.raises(ModelError) as met:
        spec_from_hf(QWEN3_OLD | change)
    for text in texts:
        assert text in str(met.value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "olmoe", "head_dim": 64}, "head_dim 64"),
        ({"model_type": "olmoe", "sliding_window": 128}, "'sliding_window' is 128"),
        ({"model_type": "olmoe", "clip_qkv": -1}, "'clip_qkv' is -1"),
        ({"model_type": "mixtral", "norm_topk_prob": False}, "'norm_topk_prob' is False"),
        ({"model_type": "mixtral", "attention_bias": True}, "'attention_bias' is True"),
        ({"model_type": "mixtral", "sliding_window": 0}, "'sliding_window' is 0"),
        ({"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": None}, "'sliding_window' is None"),
        ({"model_type": "qwen2_moe", "layer_types": ["sliding_attention"] * 24}, "'use_sliding_window' is False"),
        ({"model_type": "qwen2_moe", "layer_types": ["full_attention"]}, "'layer_types'"),
        ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 0}, "'shared_expert_intermediate_size' is 0"),
    ],
)
def test_refused_in_a_family(config, text):
    with pytest.raises(ModelError) as met:
        spec_from_hf(config)
    assert text in str(met.value)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_unknown_fields_that_are_off_pass(value):
    assert spec_from_hf(QWEN3_OLD | {"something_new": value}) == spec_from_hf(QWEN3_OLD)


def test_null_kv_heads_mean_one_each():
    assert spec_from_hf({"model_type": "mixtral", "num_key_value_heads": None}).num_kv_heads == 32


def test_family_from_the_architecture_alone():
    assert spec_from_hf({"architectures": ["OlmoeForCausalLM"]}).family == "olmoe"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-30B-A3B", 30.5),
        ("Qwen3-235B-A22B", 235.1),
        ("Qwen1.5-MoE-A2.7B", 14.3),
        ("Qwen2-57B-A14B", 57.4),
        ("Mixtral-8x7B", 46.7),
        ("Mixtral-8x22B", 140.6),
        ("OLMoE-1B-7B", 6.92),
    ],
)
def test_presets_have_the_published_size(name, billions):
    from moe_prefill.shapes import bank_shapes, slot_shapes

    spec = spec_from_hf(preset(name))
    shapes = slot_shapes(spec) | bank_shapes(spec)
    total = 0
    for shape in shapes.values():
        size = 1
        for length in shape:
            size *= length
        total += size
    assert total / 1e9 == pytest.approx(billions, rel=0.003)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ModelError, match=r"no preset 'Qwen4'; presets: Mixtral-8x22B, .*Qwen3-30B-A3B"):
        preset("Qwen4")
    assert {spec_from_hf(preset(name)).family for name in preset_names()} == set(FAMILIES)


def test_configs_and_presets_need_no_torch():
    code = "import sys, moe_prefill.models as m; m.preset('OLMoE-1B-7B'); assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
