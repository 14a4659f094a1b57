"""Float8 checkpoints with block scales: what is loaded is what the blocks stand for, in every form and place."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prefill import ops
from moe_prefill.checkpoint import open_checkpoint
from moe_prefill.engine.banks import BankMemory
from moe_prefill.engine.load import load_weights, open_model
from moe_prefill.errors import ModelError
from moe_prefill.strategies import share_of
from moe_prefill.strategies.load import checkpoint_fill, load_share
from tests.checkpoint.float8_models import QUANTIZATION, save
from tests.checkpoint.test_load_families import flatten


def parameters(model):
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("fused", [None, "apart", "joint"])
@pytest.mark.parametrize("size", [64, 128, 160, 208])  # of an expert; gate and up of 64 rows share a block where joint
def test_loaded_wide_is_what_the_blocks_stand_for(fused, size, tmp_path):
    model, _ = save(tmp_path, fused=fused, moe_intermediate_size=size)
    loaded = load_weights(tmp_path, dtype=torch.float32)
    assert loaded[0].float8_blocks
    got = flatten(*loaded)
    for name, want in parameters(model).items():
        if fused == "joint" and name.endswith("experts.gate_up_proj") and -(-2 * size // 128) == 2 * -(-size // 128):
            continue  # as many rows of scales as two grids have: read as two, which published experts have
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_scales_of_other_types_in_another_file(scale_dtype, tmp_path):
    model, _ = save(tmp_path, scale_dtype=scale_dtype, shards=True)
    got = flatten(*load_weights(tmp_path, dtype=torch.float32))
    for name, want in parameters(model).items():
        assert torch.equal(got[name], want), name


def test_the_same_as_transformers_makes_of_it(tmp_path):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    _, stored = save(tmp_path)
    got = flatten(*load_weights(tmp_path, dtype=torch.float32))
    checked = 0
    for name, values in stored.items():
        if f"{name}_scale_inv" in stored and name in got:
            scale = stored[f"{name}_scale_inv"]
            assert torch.equal(got[name], fp8._dequantize_fp8_weight(values, scale, [128, 128], torch.float32)), name
            checked += 1
    assert checked == 11, "q, k, v and o of two layers, and the dense layer's three"


def test_pieces_smaller_than_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_prefill.checkpoint.reader.SCALED_BYTES", 1)
    model, _ = save(tmp_path, fused="apart")
    got = flatten(*load_weights(tmp_path, dtype=torch.float32))
    for name, want in parameters(model).items():
        assert torch.equal(got[name], want), name


def rows_close(got: ops.Float8Rows, want: torch.Tensor) -> None:
    """Each value within half a step of e4m3 at the row's scale: a sixteenth of itself, or of the smallest step."""
    assert got.scale.shape == want.shape[:-1]
    torch.testing.assert_close(got.scale, want.abs().amax(-1) / 448, rtol=1e-6, atol=0)
    allowed = torch.maximum(want.abs() / 16, got.scale[..., None] * 2.0**-10) * 1.001
    assert ((got.wide(torch.float32) - want).abs() <= allowed).all()


def test_linear_maps_are_quantised_again_row_by_row(tmp_path):
    save(tmp_path)
    _, wide, _ = load_weights(tmp_path, dtype=torch.float32)
    _, got, _ = load_weights(tmp_path, dtype=torch.float32, float8=True)
    rows_close(got.layers[0].attention.qkv, wide.layers[0].attention.qkv)
    rows_close(got.layers[0].attention.out, wide.layers[0].attention.out)
    rows_close(got.layers[1].ffn.gate_up, wide.layers[1].ffn.gate_up)
    assert torch.equal(got.layers[0].ffn.router, wide.layers[0].ffn.router)
    assert torch.equal(got.lm_head, wide.lm_head)


WHOLE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def test_linear_maps_keep_their_blocks_as_stored(tmp_path):
    """Where they consist of whole ones: here all but the dense layer's gate, up and down of 144 channels."""
    _, stored = save(tmp_path, **WHOLE)
    _, wide, _ = load_weights(tmp_path, dtype=torch.float32)
    _, got, _ = load_weights(tmp_path, dtype=torch.float32, float8=True, blocks=True)
    for layer, mine in enumerate(got.layers):
        prefix = f"model.layers.{layer}.self_attn."
        for matrix, parts in ((mine.attention.qkv, "qkv"), (mine.attention.out, "o")):
            names = [f"{prefix}{part}_proj.weight" for part in parts]
            assert isinstance(matrix, ops.Float8Blocks)
            values = torch.cat([stored[name].view(torch.uint8) for name in names])
            assert torch.equal(matrix.values.view(torch.uint8), values)
            assert torch.equal(matrix.scale, torch.cat([stored[f"{name}_scale_inv"] for name in names]))
        assert torch.equal(mine.attention.out.wide(torch.float32), wide.layers[layer].attention.out)
    rows_close(got.layers[1].ffn.gate_up, wide.layers[1].ffn.gate_up)


def test_linear_maps_that_are_stored_wide_get_blocks(tmp_path, monkeypatch):
    """Read in pieces that are no whole blocks, unless the reader sees to it."""
    save(tmp_path, **WHOLE)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = tensors.pop(f"{name}_scale_inv")
    wide = ops.dequantize_blocks(tensors[name], scale)
    save_file(tensors | {name: wide}, tmp_path / "model.safetensors")
    monkeypatch.setattr("moe_prefill.checkpoint.reader.BOUNCE_BYTES", 200 * 4 * 256)
    _, got, _ = load_weights(tmp_path, dtype=torch.float32, float8=True, blocks=True)
    torch.testing.assert_close(got.layers[0].attention.qkv[:256].wide(torch.float32), wide, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [None, "apart"])
def test_experts_keep_their_blocks_as_stored(fused, tmp_path):
    _, stored = save(tmp_path, fused=fused, moe_intermediate_size=128, hidden_size=256)
    spec, _ = open_model(tmp_path)
    memory = BankMemory(spec, ["resident", None], dtype=ops.FLOAT8, device=torch.device("cpu"), blocks=True)
    _, _, wide = load_weights(tmp_path, dtype=torch.float32)
    load_weights(tmp_path, dtype=torch.float32, allocate=memory.allocate, keep=memory.keep, float8=True)
    source = memory.source()
    source.begin_sweep()
    bank = source.acquire(0)
    gate_up_scale, down_scale = bank.scales
    gates = gate_up_scale[:, :2].flatten(1, 2)
    assert torch.equal(ops.dequantize_blocks(bank.gate_up, gates), wide[0].gate_up)
    assert torch.equal(ops.dequantize_blocks(bank.down, down_scale[:, 2]), wide[0].down)
    if fused is None:
        name = "model.layers.0.mlp.experts.3.down_proj.weight"
        assert torch.equal(bank.down[3].view(torch.uint8), stored[name].view(torch.uint8))
        assert torch.equal(down_scale[3, 2], stored[f"{name}_scale_inv"])


@pytest.mark.parametrize(("name", "size"), [("tp+tp", 2), ("dp+tp", 2), ("tp+ep", 2), ("dp+ep", 3)])
def test_a_rank_makes_scales_for_its_own_part(name, size, tmp_path):
    """208 channels of an expert on two ranks: each part ends within a block."""
    save(tmp_path)
    spec, checkpoint = open_model(tmp_path)
    for rank in range(size):
        share = share_of(spec, name, rank, size)
        fill = checkpoint_fill(share, checkpoint, dtype=torch.float32, device=torch.device("cpu"))
        weights, banks = load_share(share, fill, "float8_e4m3fn")
        wide, wide_banks = load_share(share, fill, "float32")
        rows_close(weights.layers[0].attention.out, wide.layers[0].attention.out)
        rows_close(weights.layers[0].attention.qkv, wide.layers[0].attention.qkv)
        rows_close(ops.Float8Rows(banks[0].down, banks[0].down_scale), wide_banks[0].down)
        rows_close(ops.Float8Rows(banks[0].gate_up, banks[0].gate_up_scale), wide_banks[0].gate_up)


def changed(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.experts.2.up_proj.weight"


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def fill_scale(value):
    return lambda tensors: tensors[f"{UP}_scale_inv"].view(-1)[1:2].fill_(value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop(f"{Q}_scale_inv"), f"scales that fit (1): {Q} has no {Q}_scale_inv"),
        (put(f"{Q}_scale_inv", torch.ones(3, 1)), f"{Q}_scale_inv is [3, 1] where blocks of [288, 160] need [3, 2]"),
        (put(f"{Q}_scale_inv", torch.ones(3, 2, dtype=torch.int32)), f"{Q}_scale_inv is I32 where F32, BF16, F16"),
        (put("model.layers.0.mlp.gate.weight_scale_inv", torch.ones(1, 2)), "left over (1): model.layers.0.mlp.gate"),
        (put(f"{UP}_scale_inv", torch.full((2, 2), math.nan)), f"{UP}_scale_inv has 4 of 4 scales"),
        (fill_scale(math.inf), f"{UP}_scale_inv has 1 of 4 scales"),
        (fill_scale(-1.0), f"{UP}_scale_inv has 1 of 4 scales"),
        (put("model.norm.weight", torch.ones(160).to(ops.FLOAT8)), "wrong type (1): model.norm.weight is F8_E4M3"),
    ],
)
def test_scales_that_do_not_fit(change, text, tmp_path):
    save(tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ModelError) as met:
        load_weights(tmp_path)
    assert text in str(met.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weight_block_size": [64, 64]}, "weight_block_size [64, 64]"),
        ({"weight_block_size": None}, "weight_block_size None"),
        ({"activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        ({"kv_cache_scheme": {"bits": 8}}, "kv_cache_scheme"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
    ],
)
def test_other_float8_is_refused(settings, text, tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION | settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as met:
        open_model(tmp_path)
    assert text in str(met.value)
    assert "weight_block_size [128, 128] and dynamic" in str(met.value)


def test_the_published_type_is_not_that_of_scales(tmp_path):
    _, stored = save(tmp_path)
    lowered = {n: t if t.dtype != torch.float32 or "_scale_inv" in n else t.bfloat16() for n, t in stored.items()}
    save_file(lowered, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).dtype == "bfloat16"
