"""Ops against definitions that are independent of how they are computed."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_prefill import ops
from moe_prefill.ops.attention import Spans, ref_attention
from moe_prefill.ops.experts import ref_experts
from moe_prefill.ops.flash import packs_heads
from moe_prefill.ops.grouped import ref_grouped_mm
from moe_prefill.ops.rms_norm import ref_rms_norm
from tests.conftest import DEVICE


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def spans(q, k):
    return Spans.on(DEVICE, np.cumsum([0, *q]).astype(np.int32), np.cumsum([0, *k]).astype(np.int32))


def dtypes():
    return [torch.float32, torch.bfloat16]


ENTRIES = [
    ([5], [5], True, None),
    ([3, 7, 3, 1], [9, 7, 9, 4], True, None),
    ([3, 7, 3, 1], [9, 7, 9, 4], True, 3),
    ([4, 4, 0, 6], [2, 0, 3, 11], False, None),
    ([33, 1, 60], [64, 130, 60], True, 17),
    ([150, 3, 64], [150, 3, 200], True, None),  # long entries are worked through in blocks of rows on a CPU
    ([100, 64], [300, 64], True, 70),
    ([130], [97], False, None),
    ([256, 128], [256, 400], True, None),  # whole tiles of a kernel whose tiles hold one head
]


@pytest.mark.parametrize(("q", "k", "causal", "window"), ENTRIES)
@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 1, 8), (2, 2, 64)])
def test_attention(q, k, causal, window, dtype, heads, kv_heads, dim):
    at = spans(q, k)
    queries = random(sum(q), heads, dim, dtype=dtype)
    keys, values = (random(sum(k), kv_heads, dim, dtype=dtype, seed=s) for s in (1, 2))
    out, lse = ops.attention(queries, keys, values, at, causal=causal, window=window, scale=dim**-0.5)
    want, want_lse = ref_attention(queries, keys, values, at, causal=causal, window=window, scale=dim**-0.5)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, want, **tolerance)
    torch.testing.assert_close(lse, want_lse, **tolerance)


def test_a_query_without_keys_is_zero_and_minus_infinity():
    out, lse = ops.attention(
        random(4, 2, 8), random(3, 1, 8), random(3, 1, 8), spans([2, 2], [0, 3]), causal=False, scale=1.0
    )
    assert (out[:2] == 0).all()
    assert (lse[:2] == -math.inf).all()
    assert torch.isfinite(lse[2:]).all()


@pytest.mark.parametrize(
    ("num_q", "heads", "packs"),
    [
        ([4096] * 16, 16, False),  # whole tiles either way
        ([512] * 9, 8, False),
        ([300] * 200, 8, True),  # three tiles a head for 2.35
        ([16] * 500, 8, True),  # an eighth of a tile a head
        ([1500] * 40, 8, False),  # 2% more tiles, each of them 4% shorter
        ([5000] * 13, 8, True),  # 2% more tiles, each of them 1% shorter
        ([16] * 500, 1, False),  # nothing to pack
        ([0, 256], 4, False),
    ],
)
def test_heads_are_packed_where_that_is_shorter(num_q, heads, packs):
    rows = np.array(num_q, np.int32)
    assert packs_heads(rows, rows, heads, causal=True) is packs


def test_empty_tiles_weigh_more_with_many_keys():
    rows = np.full(4, 700, np.int32)  # 10% more tiles without packing
    assert not packs_heads(rows, np.full(4, 64, np.int32), 8, causal=False)
    assert packs_heads(rows, np.full(4, 2048, np.int32), 8, causal=False)


def test_merging_splits_of_the_keys_gives_the_whole():
    q, k, v = random(6, 4, 16), random(20, 2, 16, seed=1), random(20, 2, 16, seed=2)
    whole, whole_lse = ops.attention(q, k, v, spans([6], [20]), causal=False, scale=0.25)
    out, lse = torch.zeros(6, 4, 16, device=DEVICE), torch.full((6, 4), -math.inf, device=DEVICE)
    for low, high in ((0, 0), (0, 7), (7, 8), (8, 20), (20, 20)):
        part = ops.attention(q, k[low:high], v[low:high], spans([6], [high - low]), causal=False, scale=0.25)
        ops.merge_(out, lse, *part)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


def test_merge_example_of_the_docstring():
    out, lse = torch.ones(1, 1, 1), torch.zeros(1, 1)
    ops.merge_(out, lse, torch.full((1, 1, 1), 3.0), torch.zeros(1, 1))
    assert out.item() == pytest.approx(2)
    assert lse.item() == pytest.approx(math.log(2))


def test_rope_example_of_the_docstring():
    from moe_prefill.ops.rope import ref_apply_rope

    got = ref_apply_rope(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    assert got.tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 4), (37, 7, 2), (64, 16, 3)])
def test_experts(tokens, experts, top_k, dtype):
    x, residual = random(tokens, 32, dtype=dtype), random(tokens, 32, dtype=dtype, seed=1)
    gate_up, down = random(experts, 48, 32, dtype=dtype, seed=2), random(experts, 32, 24, dtype=dtype, seed=3)
    weights, ids = ops.route(x, random(experts, 32, dtype=dtype, seed=4), top_k, normalize=True, float32_weights=False)
    got = ops.experts(x, weights, ids, gate_up, down, residual)
    want = residual + ref_experts(x, weights, ids, gate_up, down)
    tolerance = {"rtol": 5e-2, "atol": 1.0} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, want, **tolerance)


def test_experts_that_nobody_chose_and_one_that_all_chose():
    x, gate_up, down = random(9, 16), random(5, 16, 16, seed=1), random(5, 16, 8, seed=2)
    ids, weights = torch.full((9, 1), 3, device=DEVICE), torch.ones(9, 1, device=DEVICE)
    got = ops.experts(x, weights, ids, gate_up, down, torch.zeros_like(x))
    torch.testing.assert_close(got, ref_experts(x, weights, ids, gate_up, down), rtol=1e-4, atol=1e-4)


def test_order_example_of_the_docstring():
    order = ops.order_by_expert(torch.tensor([[1, 0], [1, 2]], device=DEVICE), 3)
    assert order.ends_E.tolist() == [1, 3, 4]
    assert order.token_of_row_R.tolist() == [0, 0, 1, 1]
    assert order.row_of_slot_TK.tolist() == [[1, 0], [2, 3]]


def test_aligned_rows_begin_at_multiples():
    order = ops.order_by_expert(torch.tensor([[1, 0], [1, 2]], device=DEVICE), 3, alignment=4)
    assert order.ends_E.tolist() == [4, 8, 12]
    assert order.token_of_row_R.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert order.row_of_slot_TK.tolist() == [[4, 0], [5, 8]]


@settings(deadline=None)  # a GPU compiles kernels in the first examples
@given(
    arrays(np.int64, st.tuples(st.integers(1, 40), st.integers(1, 5)), elements=st.integers(0, 8)), st.integers(1, 9)
)
def test_an_experts_rows_are_together_and_in_token_order(ids, experts):
    order = ops.order_by_expert(torch.from_numpy(ids).to(DEVICE), experts, int((ids < experts).sum()))
    ends, tokens, rows = (t.cpu().numpy() for t in (order.ends_E, order.token_of_row_R, order.row_of_slot_TK))
    assert np.diff(ends, prepend=0).tolist() == np.bincount(ids[ids < experts], minlength=experts).tolist()
    assert sorted(rows[ids < experts].tolist()) == list(range(len(tokens)))
    assert (rows[ids >= experts] == -1).all()
    for token, slot in zip(*np.nonzero(ids < experts), strict=True):
        row = rows[token, slot]
        assert tokens[row] == token
        assert ends[ids[token, slot]] - np.sum(ids == ids[token, slot]) <= row < ends[ids[token, slot]]
    for low, high in itertools.pairwise([0, *ends]):
        assert (np.diff(tokens[low:high]) >= 0).all()


def test_rows_of_another_bank_add_nothing():
    rows, residual = random(2, 8), random(1, 8, seed=1)
    weights, slots = torch.ones(1, 2, device=DEVICE), torch.tensor([[-1, 1]], device=DEVICE)
    torch.testing.assert_close(ops.combine(rows, slots, weights, residual)[0], residual[0] + rows[1])


@pytest.mark.parametrize("dtype", dtypes())
def test_a_residual_is_added_and_normed(dtype):
    wide, delta = random(5, 24, dtype=dtype), random(5, 16, dtype=dtype, seed=1)
    weight = random(16, dtype=dtype, seed=2)
    x = wide[:, :16]
    want = x + delta
    normed = ops.add_rms_norm_(x, delta, weight, 1e-6)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.equal(wide[:, :16], want)
    torch.testing.assert_close(normed, ref_rms_norm(want, weight, 1e-6), **tolerance)


def normed_of(norm):
    """What was written, as (rows, scales)."""
    rows, scale = norm.tensors
    return (rows, torch.zeros(0)) if scale is None else (rows.view(torch.uint8), scale)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("by", ["combine", "add", "experts", "no experts"])
def test_what_writes_rows_norms_them_too(by, float8, dtype):
    """The residual without a norm and the norm of that, bit for bit, in the middle of both buffers and nowhere else."""
    x, weight = random(12, 16, dtype=dtype), random(16, dtype=dtype, seed=1)
    rows, slots = random(12, 16, dtype=dtype, seed=2), torch.arange(12, device=DEVICE).view(6, 2)
    slots[2, 1] = -1
    routes, ids = random(6, 2, dtype=dtype, seed=3), torch.arange(12, device=DEVICE).view(6, 2) % 3
    matrices = random(3, 16, 16, dtype=dtype, seed=4), random(3, 16, 8, dtype=dtype, seed=5)
    write = {
        "combine": lambda base, out, norm: ops.combine(rows, slots, routes, base, out, norm),
        "add": lambda base, out, norm: ops.add_rms_norm(base, rows[:6], out, norm),
        "experts": lambda base, out, norm: ops.experts(rows[:6], routes, ids, *matrices, base, out=out, norm=norm),
        "no experts": lambda base, out, norm: ops.experts(
            rows[:6], routes, ids + 3, *matrices, base, num_rows=0, out=out, norm=norm
        ),
    }[by]
    buffer = ops.Float8Rows.of(random(12, 16, seed=6)) if float8 else random(12, 16, dtype=dtype, seed=6)
    norm, part = ops.NormInto(weight, 1e-6, buffer), slice(4, 10)
    before, untouched = [each.clone() for each in normed_of(norm)], x.clone()
    alone = torch.empty_like(x[part])
    write(x[part], alone, None)
    assert torch.equal(x, untouched)
    write(x[part], x[part], norm[part])
    assert torch.equal(x[part], alone)
    separate = ops.rms_norm_quantize(alone, weight, 1e-6) if float8 else ops.rms_norm(alone, weight, 1e-6)
    for got, want, old in zip(normed_of(norm), normed_of(ops.NormInto(weight, 1e-6, separate)), before, strict=True):
        assert torch.equal(got[part], want)
        assert torch.equal(got[:4], old[:4])
        assert torch.equal(got[10:], old[10:])
    assert torch.equal(x[:4], untouched[:4])
    assert torch.equal(x[10:], untouched[10:])


def test_float8_rows_are_chosen_by_slices_and_by_indices():
    rows = ops.Float8Rows.of(random(7, 16))
    for chosen in (slice(2, 5), torch.tensor([6, 0, 0], device=DEVICE)):
        assert torch.equal(rows[chosen].wide(torch.float32), rows.wide(torch.float32)[chosen])
    rows[2:5].scale.zero_()
    assert rows.scale.eq(0).nonzero().flatten().tolist() == [2, 3, 4], "a slice is a view"


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_is_added_to_the_residual_and_normed(dtype, bias):
    x, weight, norm = random(5, 24, dtype=dtype), random(16, 24, dtype=dtype, seed=1), random(16, dtype=dtype, seed=2)
    residual, bias_N = random(5, 16, dtype=dtype, seed=3), random(16, dtype=dtype, seed=4) if bias else None
    want = residual + torch.nn.functional.linear(x, weight, bias_N)
    normed = ops.linear_add_rms_norm_(x, weight, bias_N, residual, norm, 1e-6)
    tolerance = {"rtol": 2e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(residual, want, **tolerance)
    torch.testing.assert_close(normed, ref_rms_norm(residual, norm, 1e-6), **tolerance)


@pytest.mark.parametrize("normalize", [False, True])
def test_route(normalize):
    x, router = random(20, 8), random(6, 8, seed=1)
    weights, ids = ops.route(x, router, 3, normalize=normalize, float32_weights=True)
    scores = (x @ router.t()).softmax(-1)
    torch.testing.assert_close(
        scores.gather(1, ids), weights * (1 if not normalize else scores.gather(1, ids).sum(-1, keepdim=True))
    )
    assert (scores.topk(3).indices == ids).all()


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("block", [1, 3, 100])
def test_head(dtype, block):
    x, head = random(7, 16, dtype=dtype), random(50, 16, dtype=dtype, seed=1)
    dense = x.float() @ head.float().t()
    row = torch.tensor([0, 0, 2, 5, 5, 6], device=DEVICE)
    ids = torch.tensor([3, 3, 49, 0, 7, 11], device=DEVICE)
    unique, inverse = ids.unique(return_inverse=True)
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(ops.candidate_logits(x, head, row, ids, unique, inverse), dense[row, ids], **tolerance)
    bounds = [int((row < low).sum()) for low in range(0, 7 + block, block)]
    logits, log_z, top_ids, top = ops.vocabulary_scores(x, head, row, ids, bounds, rows_per_block=block, top_k=4)
    torch.testing.assert_close(logits, dense[row, ids], **tolerance)
    torch.testing.assert_close(log_z, dense.logsumexp(-1), **tolerance)
    torch.testing.assert_close(top, dense.topk(4).values, **tolerance)
    torch.testing.assert_close(dense.gather(1, top_ids), top, **tolerance)


def test_many_distinct_candidates_are_read_pair_by_pair(monkeypatch):
    import moe_prefill.ops.head as head_module

    monkeypatch.setattr(head_module, "_UNIQUE_IDS_LIMIT", 1)
    test_head(torch.float32, 3)


@pytest.mark.parametrize("counts", [[0, 3, 70, 0, 1, 33, 31], [1], [64, 0, 0], [0, 0, 5], [200, 1, 1, 1, 40]])
@pytest.mark.parametrize("dtype", dtypes())
def test_grouped_products_leave_every_row_to_its_own_group(counts, dtype):
    rows, weights = random(sum(counts), 24, dtype=dtype), random(len(counts), 40, 24, dtype=dtype, seed=1)
    ends = torch.tensor(np.cumsum(counts), dtype=torch.int32, device=DEVICE)
    want = ref_grouped_mm(rows, weights, ends)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ops.grouped_mm(rows, weights, ends), want, **tolerance)


@pytest.mark.parametrize("dtype", dtypes())
def test_a_scripted_function_gives_what_its_python_gives(dtype):
    """Python 3.14 and later run it as it stands."""
    from moe_prefill.ops import cpu_attention

    q, k, v = (torch.randn(150, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    given = [x.to(dtype) for x in (q, k, v)]
    found = []
    for function in (cpu_attention.large_entries_, cpu_attention.large_entries_.__wrapped__):
        out, lse = torch.zeros_like(given[0]), torch.zeros(150, 4)
        function(*given, out, lse, [(0, 70), (70, 150)], [(0, 70), (70, 150)], [True, False], True, 40, 0.25)
        found.append((out, lse))
    assert all(map(torch.equal, *found))
    assert not found[0][1][70:].any()
