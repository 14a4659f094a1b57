"""What ranks keep and where rows go, without processes: shares, loading, dispatch, steps, refusals."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill import ops
from moe_prefill.config import EngineConfig
from moe_prefill.engine.load import load_weights, open_model
from moe_prefill.errors import PlanError, UsageError
from moe_prefill.models import preset, spec_from_hf
from moe_prefill.shapes import bank_shapes, slot_shapes
from moe_prefill.strategies import NAMES, requested_share, share_of
from moe_prefill.strategies.build import plan_share
from moe_prefill.strategies.dispatch import (
    destinations,
    grouped_sources,
    homes,
    pack_choices,
    send_order,
    unpack_choices,
)
from moe_prefill.strategies.load import checkpoint_fill, dummy_fill, load_share
from moe_prefill.strategies.lockstep import Lockstep, chunk_sizes
from moe_prefill.strategies.memory import share_weights
from tests.reference import random_model

BIG = spec_from_hf(preset("Qwen3-235B-A22B"))
CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_hold_the_model_once_beside_what_is_replicated(name, size):
    shares = [share_of(BIG, name, rank, size) for rank in range(size)]
    held = sum(sum(share_weights(share, "bfloat16", "bfloat16").values()) for share in shares)
    others, banks = (2 * sum(map(math.prod, shapes(BIG).values())) for shapes in (slot_shapes, bank_shapes))
    assert others + banks <= held <= size * others + banks
    if name.endswith("+ep"):
        assert [e for share in shares for e in share.experts] == list(range(128))
    if name == "pp+pp":
        assert [layer for share in shares for layer in share.layers] == list(range(94))


def test_heads_beyond_the_key_value_heads_share_them():
    assert [share_of(BIG, "tp+tp", rank, 8).spec.num_kv_heads for rank in range(8)] == [1] * 8
    six = dataclasses.replace(BIG, num_heads=6, num_kv_heads=3, expert_size=64)
    halves = [share_of(six, "tp+tp", rank, 2) for rank in range(2)]  # heads 0 1 | 2: three a rank, two to a key head
    assert [share.spec.num_kv_heads for share in halves] == [3, 3]
    keys = [[part.start // 128 - 6 for part in share.cuts["qkv"].ranges[1:4]] for share in halves]
    assert keys == [[0, 0, 1], [1, 2, 2]]


@pytest.mark.parametrize(
    ("changed", "name", "size", "numbers"),
    [
        ({"num_heads": 66, "num_kv_heads": 3}, "tp+ep", 4, ("66", "4", "2 ranks")),
        ({"expert_size": 1540}, "dp+tp", 8, ("1540", "8", "4 ranks")),
        ({"shared_size": 30}, "tp+ep", 4, ("30", "4", "2 ranks")),
        ({"num_experts": 8}, "dp+ep", 9, ("8", "9")),
        ({"layers": BIG.layers[:3]}, "pp+pp", 4, ("3", "4")),
    ],
)
def test_shapes_that_cannot_be_split_are_refused_with_the_numbers(changed, name, size, numbers):
    with pytest.raises(UsageError) as refused:
        share_of(dataclasses.replace(BIG, **changed), name, 0, size)
    assert all(number in str(refused.value) for number in (name, *numbers))


def test_asyncep_is_no_baseline():
    with pytest.raises(UsageError, match="asyncep"):
        requested_share(EngineConfig(model="any"), BIG, 0, 2)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_before_loading(name):
    config = EngineConfig(model="any", strategy=name, host_gib=2.0)
    with pytest.raises(PlanError, match=r"under .* on 2 ranks"):
        plan_share(config, share_of(BIG, name, 0, 2), CPU, torch.bfloat16)


def test_a_share_is_the_part_of_the_whole(tmp_path):
    model = random_model("qwen2_moe", 0)
    model.save_pretrained(tmp_path)
    spec, checkpoint = open_model(tmp_path)
    _, weights, banks = load_weights(tmp_path)
    share = share_of(spec, "tp+tp", 1, 2)
    mine, my_banks = load_share(share, checkpoint_fill(share, checkpoint, dtype=torch.float32, device=CPU), "float32")
    q, half = spec.num_heads * spec.head_dim, spec.num_heads * spec.head_dim // 2
    for layer, part in zip(weights.layers, mine.layers, strict=True):
        assert torch.equal(part.attention.qkv[:half], layer.attention.qkv[half:q])
        assert torch.equal(part.attention.out, layer.attention.out[:, half:])
        assert torch.equal(part.ffn_norm, layer.ffn_norm)
    for bank, part in zip(banks, my_banks, strict=True):
        assert (bank is None) == (part is None)
        if bank is not None:
            size = spec.expert_size
            gate, up = bank.gate_up.split(size, dim=1)
            assert torch.equal(part.gate_up, torch.cat([gate[:, size // 2 :], up[:, size // 2 :]], dim=1))
            assert torch.equal(part.down, bank.down[:, :, size // 2 :])


def test_dummy_shares_are_those_of_the_same_model():
    spec = dataclasses.replace(
        BIG,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_experts=7,
        top_k=2,
        expert_size=16,
        vocab_size=50,
    )
    spec = dataclasses.replace(spec, layers=spec.layers[:3])
    fill = {"dtype": torch.float32, "device": CPU, "seed": 3, "skew": 1.0}
    ((whole, banks),) = [load_share(s, dummy_fill(s, **fill), "float32") for s in [share_of(spec, "dp+ep", 0, 1)]]
    shares = [share_of(spec, "dp+ep", rank, 3) for rank in range(3)]
    parts = [load_share(share, dummy_fill(share, **fill), "float32") for share in shares]
    for layer in range(3):
        assert torch.equal(torch.cat([mine[layer].down for _, mine in parts]), banks[layer].down)
    stages = [share_of(spec, "pp+pp", rank, 3) for rank in range(3)]
    for layer, stage in enumerate(stages):
        mine, my_banks = load_share(stage, dummy_fill(stage, **fill), "float32")
        assert torch.equal(mine.layers[0].attention.out, whole.layers[layer].attention.out)
        assert [bank is not None for bank in my_banks] == [at == layer for at in range(3)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_dispatch_sends_a_token_once_to_a_rank_and_finds_it_again(tokens, top_k, size, seed):
    random = np.random.default_rng(seed)
    experts = int(random.integers(max(size, top_k), 12))
    ids = torch.from_numpy(random.random((tokens, experts)).argsort(axis=1)[:, :top_k].copy())
    starts = torch.tensor([rank * experts // size for rank in range(size)])
    to = destinations(ids, starts)
    owner = [[max(r for r in range(size) if starts[r] <= e) for e in row] for row in ids.tolist()]
    want = [(rank, token) for rank in range(size) for token in range(tokens) if rank in owner[token]]
    rank, token = send_order(to, len(want))
    assert list(zip(rank.tolist(), token.tolist(), strict=True)) == want
    assert to.counts[:, 0].tolist() == [sum(r == rank for r, _ in want) for rank in range(size)]
    assert to.counts[:, 1].tolist() == [sum(row.count(rank) for row in owner) for rank in range(size)]
    for token, row in enumerate(homes(to).tolist()):
        for rank, place in enumerate(row):
            assert place == (want.index((rank, token)) if (rank, token) in want else 0)


def test_the_example_of_destinations():
    to = destinations(torch.tensor([[0, 1], [1, 3]]), torch.tensor([0, 2]))
    assert to.needed.tolist() == [[True, True], [False, True]]
    assert to.counts.tolist() == [[2, 3], [1, 1]]


def test_choices_survive_packing():
    weights, ids, scale = torch.rand(5, 3), torch.randint(0, 300, (5, 3)), torch.rand(5)
    for with_scale in (None, scale):
        back, ids_back, scale_back = unpack_choices(pack_choices(weights, ids, with_scale), 3)
        assert torch.equal(back, weights)
        assert torch.equal(ids_back, ids)
        assert scale_back is None if with_scale is None else torch.equal(scale_back, scale)


def test_received_rows_are_grouped_within_memory():
    assert grouped_sources([4, 4], [16, 16], 64) == [(slice(0, 8), 32)]
    assert grouped_sources([4, 0, 5], [16, 0, 40], 40) == [(slice(0, 4), 16), (slice(4, 9), 40)]
    assert grouped_sources([0, 0], [0, 0], 40) == []


@given(st.integers(0, 500), st.integers(1, 60))
def test_chunks_are_few_and_near_equal(total, most):
    sizes = chunk_sizes(total, most)
    assert sizes.sum() == total
    assert len(sizes) == -(-total // most)
    assert total == 0 or 0 < sizes.min() <= sizes.max() <= min(most, sizes.min() + 1)


def test_steps_give_every_rank_its_chunks():
    lockstep = Lockstep(np.array([[10, 1], [0, 0], [25, 3]]), 10)
    assert lockstep.steps(last=False).tolist() == [[10, 0, 8], [0, 0, 8], [0, 0, 9]]
    assert lockstep.steps(last=True).tolist() == [[1, 0, 3]]
    assert Lockstep(np.zeros((2, 2), np.int64), 10).is_over


@pytest.mark.parametrize("present", [0, 3, 7])
def test_experts_of_a_part_of_a_bank_add_up(present):
    torch.manual_seed(present)
    x, residual = torch.randn(6, 8), torch.randn(6, 8)
    gate_up, down = torch.randn(7, 10, 8), torch.randn(7, 8, 5)
    weights, ids = torch.rand(6, 2), torch.stack([torch.randperm(7)[:2] for _ in range(6)])
    whole = ops.experts(x, weights, ids, gate_up, down, residual)
    low = torch.where(ids < present, ids, 99)
    high = torch.where(ids >= present, ids - present, 99)
    part = ops.experts(x, weights, low, gate_up[:present], down[:present], residual, num_rows=int((low < 99).sum()))
    rest = ops.experts(x, weights, high, gate_up[present:], down[present:], part, num_rows=int((high < 99).sum()))
    torch.testing.assert_close(rest, whole)
