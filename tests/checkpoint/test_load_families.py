"""Tiny random models saved by transformers, loaded here, compared tensor by tensor with the reference's parameters."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
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

from moe_prefill.engine.load import load_weights, open_model
from moe_prefill.errors import ModelError
from moe_prefill.models.weights import DenseWeights

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "intermediate_size": 12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN = {"num_experts": 5, "moe_intermediate_size": 6, "mlp_only_layers": [1]}
MODELS = {
    "qwen3_moe": lambda **more: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **QWEN, head_dim=6, attention_bias=True, **more)
    ),
    "qwen2_moe": lambda **more: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=10, **more)
    ),
    "mixtral": lambda **more: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=5, **more)),
    "olmoe": lambda **more: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=5, **more)),
}


def build(name, **more):
    torch.manual_seed(0)
    model = MODELS[name](**more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def flatten(spec, weights, banks):
    """Our records under the reference's parameter names."""
    found = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.final_norm}
    found["lm_head.weight"] = weights.lm_head
    widths = [spec.num_heads * spec.head_dim, *2 * [spec.num_kv_heads * spec.head_dim]]
    for index, (layer, bank) in enumerate(zip(weights.layers, banks, strict=True)):
        attention, mine = layer.attention, {}
        mine["input_layernorm.weight"], mine["post_attention_layernorm.weight"] = attention.norm, layer.ffn_norm
        for kind, joined in (("weight", attention.qkv), ("bias", attention.qkv_bias)):
            for letter, part in zip("qkv", joined.split(widths) if joined is not None else (), strict=False):
                mine[f"self_attn.{letter}_proj.{kind}"] = part
        mine["self_attn.o_proj.weight"], mine["self_attn.o_proj.bias"] = attention.out, attention.out_bias
        mine["self_attn.q_norm.weight"], mine["self_attn.k_norm.weight"] = attention.q_norm, attention.k_norm
        if isinstance(layer.ffn, DenseWeights):
            assert bank is None
            mine |= dense("mlp", layer.ffn)
        else:
            mine["mlp.gate.weight"] = layer.ffn.router
            mine["mlp.experts.gate_up_proj"], mine["mlp.experts.down_proj"] = bank.gate_up, bank.down
            mine["mlp.shared_expert_gate.weight"] = layer.ffn.shared_gate
            mine |= dense("mlp.shared_expert", layer.ffn.shared) if layer.ffn.shared else {}
        found |= {f"model.layers.{index}.{name}": tensor for name, tensor in mine.items() if tensor is not None}
    return found


def dense(prefix, ffn):
    gate, up = ffn.gate_up.chunk(2)
    return {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up, f"{prefix}.down_proj.weight": ffn.down}


def assert_loads(directory, model, dtype=None):
    loaded = load_weights(directory, dtype=dtype)
    want = {name: tensor.detach() for name, tensor in model.named_parameters()}
    want.setdefault("lm_head.weight", model.lm_head.weight.detach())
    got = flatten(*loaded)
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor.to(dtype or tensor.dtype)), name
    return loaded


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_saved_by_transformers(name, fused, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path, save_original_format=not fused)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names) == fused
    assert_loads(tmp_path, model)


@pytest.mark.parametrize("name", MODELS)
def test_shards_converted_types_and_tied_embeddings(name, tmp_path):
    model = build(name, tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=2000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    spec, weights, _ = assert_loads(tmp_path, model, dtype=torch.float32)
    assert spec.dtype == "bfloat16"
    assert weights.lm_head is weights.embed


@pytest.mark.parametrize("prefix", ["", "model."])
def test_mixtral_names_may_be_mixed(prefix, tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, tensor in stored.items():
        plain = name.removeprefix("model.")
        if ".1." in plain:  # one layer in the common spelling
            for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"), ("block_sparse_moe", "mlp")):
                plain = plain.replace(f".{old}.", f".{new}.")
        renamed[plain if plain.startswith("lm_head") else prefix + plain] = tensor
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(renamed, tmp_path / "model.safetensors")
    assert_loads(tmp_path, model)


@pytest.mark.parametrize("stored", ["both", "embed", "head", "different"])
def test_tied_embeddings_in_every_form(stored, tmp_path):
    model = build("qwen3_moe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embed = tensors.pop("model.embed_tokens.weight")
    if stored != "head":
        tensors["model.embed_tokens.weight"] = embed
    if stored != "embed":
        tensors["lm_head.weight"] = embed + 1 if stored == "different" else embed.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    spec, weights, _ = load_weights(tmp_path)
    assert torch.equal(weights.embed, embed)
    assert torch.equal(weights.lm_head, embed + 1 if stored == "different" else embed)
    assert spec.tie_embeddings == (stored != "different")


@pytest.mark.parametrize("fused", [False, True])
def test_a_rank_keeps_some_experts_only(fused, tmp_path):
    model = build("olmoe")
    model.save_pretrained(tmp_path, save_original_format=not fused)
    _, _, whole = load_weights(tmp_path)
    kept = {0: range(2, 4), 1: range(0), 2: range(5)}
    _, _, banks = load_weights(tmp_path, keep=lambda slot, shape: kept[int(slot.split(".")[1])])
    assert banks[1] is None
    for layer in (0, 2):
        part = slice(kept[layer].start, kept[layer].stop)
        assert torch.equal(banks[layer].gate_up, whole[layer].gate_up[part])
        assert torch.equal(banks[layer].down, whole[layer].down[part])


def test_skipped_experts_are_not_read(tmp_path, monkeypatch):
    from moe_prefill.checkpoint.reader import PieceReader

    build("olmoe").save_pretrained(tmp_path)
    read = []
    real = PieceReader.copy_rows
    monkeypatch.setattr(
        PieceReader, "copy_rows", lambda self, entry, *rest: (read.append(entry.name), real(self, entry, *rest))[1]
    )
    load_weights(tmp_path, keep=lambda slot, shape: range(1, 2))
    experts = {name.split(".")[5] for name in read if ".experts." in name}
    assert experts == {"1"}


def test_dtype_of_a_config_without_one_is_the_stored_one(tmp_path):
    build("qwen3_moe").to(torch.float16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path)[0].dtype == "float16"


def test_config_that_contradicts_its_weights(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 8, "num_hidden_layers": 2}))
    with pytest.raises(ModelError) as met:
        load_weights(tmp_path)
    text = str(met.value)
    assert "model.layers.0.self_attn.k_proj.weight is [12, 16] where config.json needs [16, 16]" in text
    assert "Tensors left over (28): model.layers.2." in text
