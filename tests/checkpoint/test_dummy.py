"""Dummy weights: the same whatever the order, the split and the dtype; loads spread as asked."""

import pytest
import torch

from moe_prefill.checkpoint import dummy, dummy_slots
from moe_prefill.engine.load import load_weights, open_model
from moe_prefill.errors import ModelError, UsageError

SHAPES = {
    "embed": (50, 8),
    "final_norm": (8,),
    "layers.0.q_norm": (4,),
    "layers.0.qkv_bias": (40,),
    "layers.0.router": (6, 8),
    "banks.0.gate_up": (6, 10, 8),
    "banks.0.down": (6, 8, 5),
}


def make(shapes=SHAPES, dtype=torch.float32, **options):
    return dummy_slots(shapes, lambda slot, shape: torch.full(shape, float("nan"), dtype=dtype), **options)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[slot], other[slot]) for slot in one)


def test_values_depend_on_name_and_seed_only():
    first = make(seed=3)
    assert same(first, make(dict(reversed(SHAPES.items())), seed=3))
    assert same({"banks.0.down": first["banks.0.down"]}, make({"banks.0.down": SHAPES["banks.0.down"]}, seed=3))
    other = make(seed=4)
    assert not torch.equal(first["embed"], other["embed"])
    assert not torch.equal(first["banks.0.gate_up"][0], first["banks.0.gate_up"][1])


def test_norms_are_one_and_the_rest_is_normal():
    slots = make({"layers.0.ffn_norm": (9,), "embed": (500, 400), "banks.0.down": (3, 300, 200)})
    assert slots["layers.0.ffn_norm"].eq(1).all()
    for slot in ("embed", "banks.0.down"):
        assert slots[slot].mean().abs() < 3e-4
        assert slots[slot].std().item() == pytest.approx(0.02, rel=0.02)


def test_bfloat16_is_float32_rounded():
    whole, rounded = make(skew=2.0, top_k=2), make(skew=2.0, top_k=2, dtype=torch.bfloat16)
    assert all(torch.equal(whole[slot].bfloat16(), rounded[slot]) for slot in SHAPES)


@pytest.mark.parametrize("block", [1, 7, 8192])
def test_parts_equal_the_whole(monkeypatch, block):
    monkeypatch.setattr(dummy, "BLOCK_ROWS", block)
    whole = make(skew=2.0, top_k=2)
    for first, last in ((0, 2), (1, 4), (3, 6)):
        part = make(
            skew=2.0, top_k=2, keep=lambda slot, shape, a=first, b=last: range(min(a, shape[0]), min(b, shape[0]))
        )
        assert all(torch.equal(part[slot], whole[slot][first:last]) for slot in part)


@pytest.mark.parametrize(("experts", "top_k", "width"), [(128, 8, 2048), (64, 8, 512), (60, 4, 512), (8, 2, 1024)])
@pytest.mark.parametrize("skew", [1.0, 4.0, 16.0])
def test_expert_load_spans_the_skew(experts, top_k, width, skew):
    if (experts, skew) == (8, 16.0):
        with pytest.raises(UsageError, match="out of reach with 2 of 8 experts"):
            dummy.router_scales(experts, top_k, skew)
        return
    shapes = {f"layers.{layer}.router": (experts, width) for layer in range(2)}
    routers = list(make(shapes, skew=skew, top_k=top_k).values())
    x = torch.nn.functional.rms_norm(torch.randn(6000, width, generator=torch.Generator().manual_seed(1)), (width,))
    loads = [torch.bincount((x @ router.T).topk(top_k).indices.flatten(), minlength=experts) for router in routers]
    for load in loads:
        low, high = load.min().item(), load.max().item()
        assert 0.8 * skew < high / low < 2.0 * skew  # the widths of a few thousand draws spread a little more
    assert skew == 1 or loads[0].argmax() != loads[1].argmax()
    assert torch.cat(routers).std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("skew", "top_k"), [(0.5, 2), (4.0, 6), (float("inf"), 2)])
def test_impossible_skew(skew, top_k):
    with pytest.raises(UsageError, match="dummy skew"):
        make(skew=skew, top_k=top_k)


def test_engine_makes_a_model_of_any_preset(tmp_path):
    spec, checkpoint = open_model("Qwen/Qwen3-30B-A3B", "dummy", num_layers=2)
    assert checkpoint is None
    assert spec.num_layers == 2
    (tmp_path / "config.json").write_text(
        '{"model_type": "olmoe", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 30,'
        '"intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 2, "torch_dtype": "bfloat16"}'
    )
    spec, weights, banks = load_weights(tmp_path, load_format="dummy", num_layers=1)
    assert len(weights.layers) == len(banks) == spec.num_layers == 1
    assert weights.embed.dtype == banks[0].down.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="num_layers"):
        load_weights(tmp_path, num_layers=1)
    with pytest.raises(ModelError, match="has neither"):
        load_weights(tmp_path)
