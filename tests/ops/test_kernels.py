"""Triton kernels against their plain references: through the interpreter on a CPU, for real on a GPU."""

import pytest
import torch

from moe_prefill.ops.experts import ref_combine, ref_combine_rms_norm
from moe_prefill.ops.grouped import ref_grouped_mm
from moe_prefill.ops.merge import ref_merge_
from moe_prefill.ops.permute import ExpertOrder, ref_order_by_expert, ref_permute
from moe_prefill.ops.quantize import ref_quantize_rows
from moe_prefill.ops.rms_norm import ref_add_rms_norm_, ref_rms_norm
from moe_prefill.ops.rope import ref_apply_rope, rope_tables
from moe_prefill.ops.router import ref_top_k_weights
from moe_prefill.ops.rows import Float8Rows
from moe_prefill.ops.swiglu import ref_swiglu
from tests.conftest import DEVICE

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16]
# bfloat16: the interpreter cuts where the hardware rounds, so two roundings may differ by two units of 2^-8
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 40), (3, 256), (0, 16)])
def test_rms_norm(rows, width, dtype):
    from moe_prefill.ops.kernels.rms_norm import rms_norm_kernel

    wide = random(rows, width + 8, dtype=dtype)
    for x in (wide[:, :width], wide[:, :width].contiguous()):
        weight = random(width, dtype=dtype, seed=1)
        torch.testing.assert_close(rms_norm_kernel(x, weight, 1e-6), ref_rms_norm(x, weight, 1e-6), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 40), (3, 256), (0, 16)])
def test_add_rms_norm(rows, width, dtype):
    from moe_prefill.ops.kernels.rms_norm import add_rms_norm_kernel

    wide, both = random(rows, width + 8, dtype=dtype), random(rows, 2 * width, dtype=dtype, seed=2)
    delta = both[:, width:]
    x, weight = wide[:, :width], random(width, dtype=dtype, seed=1)
    expected = x.clone()
    want = ref_add_rms_norm_(expected, delta, weight, 1e-6)
    beside = wide[:, width:].clone()
    normed, total = torch.empty_like(want), torch.empty(rows, 2 * width, dtype=dtype, device=DEVICE)[:, :width]
    for out in (total, x):
        add_rms_norm_kernel(x, delta, out, weight, 1e-6, normed)
        torch.testing.assert_close(normed, want, **TOLERANCE[dtype])
        torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    assert torch.equal(wide[:, width:], beside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (37, 7, 2), (70, 128, 8), (9, 512, 16), (0, 4, 2)])
def test_top_k(tokens, experts, top_k, normalize, dtype):
    from moe_prefill.ops.kernels.router import top_k_kernel

    wide = random(tokens, experts + 3, dtype=torch.float32).mul(4).round().div(2)  # of few values: many are equal
    for logits in (wide.to(dtype)[:, :experts], wide[:, :experts].add(random(tokens, experts, dtype=torch.float32))):
        weights, ids = top_k_kernel(logits, top_k, normalize=normalize, dtype=torch.float32)
        want, want_ids = ref_top_k_weights(logits, top_k, normalize=normalize, dtype=torch.float32)
        torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-7)
        assert torch.equal(ids, want_ids)


def test_top_k_of_rows_that_are_not_finite():
    from moe_prefill.ops.kernels.router import top_k_kernel

    logits = random(4, 40, dtype=torch.float32)
    logits[0, 3], logits[1, 5], logits[2, 7] = torch.nan, torch.inf, -torch.inf
    weights, ids = top_k_kernel(logits, 8, normalize=True, dtype=torch.bfloat16)
    want, want_ids = ref_top_k_weights(logits, 8, normalize=True, dtype=torch.bfloat16)
    assert torch.isnan(weights[:2]).all()
    assert torch.isnan(want[:2]).all()
    assert torch.equal(ids, want_ids)
    assert all(len(row) == len(set(row)) and 0 <= min(row) <= max(row) < 40 for row in ids.tolist())


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "elsewhere"),
    [(1, 1, 1, 0), (40, 5, 2, 0), (50, 33, 8, 0), (20, 7, 16, 0), (60, 20, 3, 25), (10, 70, 4, 30), (0, 3, 2, 0)],
)
def test_order_and_permutation(tokens, experts, top_k, elsewhere, alignment):
    from moe_prefill.ops.kernels.order import order_by_expert_kernel
    from moe_prefill.ops.kernels.permute import permute_kernel

    draw = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, experts + elsewhere, (tokens, top_k), generator=draw).to(DEVICE)
    want = ref_order_by_expert(ids, experts, int((ids < experts).sum()), alignment)
    rows = len(want.token_of_row_R)
    got = ExpertOrder(*order_by_expert_kernel(ids, experts, rows, alignment))
    assert torch.equal(got.ends_E, want.ends_E)
    assert torch.equal(got.token_of_row_R, want.token_of_row_R.int())
    assert torch.equal(got.row_of_slot_TK, want.row_of_slot_TK.int())
    filled = want.row_of_slot_TK[want.row_of_slot_TK >= 0]
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        x = random(tokens, 56, dtype=dtype)[:, :40]
        permuted, expected = permute_kernel(x, got.row_of_slot_TK, rows), ref_permute(x, want)
        assert torch.equal(permuted.float()[filled], expected.float()[filled])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 8), (5, 3, 24), (9, 8, 128), (0, 2, 8)])
def test_merge(rows, heads, dim, dtype):
    from moe_prefill.ops.kernels.merge import merge_kernel_

    out = random(rows, 2 * heads, dim, dtype=dtype)[:, :heads]
    lse, other_lse = (random(heads, rows, dtype=torch.float32, seed=seed).mul(8).t() for seed in (1, 2))
    other = random(rows, heads, dim, dtype=torch.bfloat16, seed=3)
    for place, side in ((0, other_lse), (1, lse), (2, lse), (2, other_lse)):  # no keys on one side, or on both
        if place < rows:
            side[place] = -torch.inf
            (other if side is other_lse else out)[place] = 0
    want, want_lse = out.clone(), lse.clone()
    ref_merge_(want, want_lse, other, other_lse)
    merge_kernel_(out, lse, other, other_lse)
    torch.testing.assert_close(out, want, **TOLERANCE[dtype])
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_permuted_and_quantised_in_one_pass(dtype):
    from moe_prefill.ops.kernels.permute import permute_quantize_kernel
    from moe_prefill.ops.kernels.quantize import quantize_rows_kernel

    ids = torch.randint(0, 7, (9, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    order = ref_order_by_expert(ids, 5, int((ids < 5).sum()))
    x = random(9, 56, dtype=dtype)[:, :40]
    values, scale = permute_quantize_kernel(x, order.row_of_slot_TK, len(order.token_of_row_R))
    of_token, scale_of_token = quantize_rows_kernel(x)
    assert torch.equal(values.float(), ref_permute(of_token, order).float())
    assert torch.equal(scale, scale_of_token[order.token_of_row_R])


def test_order_of_more_blocks_than_are_summed_at_a_time(monkeypatch):
    from moe_prefill.ops.kernels import order

    monkeypatch.setattr(order, "_SLOTS", 32)
    monkeypatch.setattr(order, "_SCANNED", 4)
    ids = torch.randint(0, 6, (130, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    want = ref_order_by_expert(ids, 6)
    _, tokens, rows = order.order_by_expert_kernel(ids, 6, ids.numel())
    assert torch.equal(tokens, want.token_of_row_R.int())
    assert torch.equal(rows, want.row_of_slot_TK.int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 8), (4, 3, 24), (5, 9, 128)])
@pytest.mark.parametrize("norm", [False, True])
def test_head_norm_rope(tokens, heads, dim, norm, dtype):
    from moe_prefill.ops.kernels.rope import head_norm_rope_kernel

    flat = random(tokens, 2 * heads * dim, dtype=dtype)[:, : heads * dim].unflatten(-1, (heads, dim))
    inv_freq = 1.0 / 1e4 ** (torch.arange(0, dim, 2, device=DEVICE) / dim)
    cos, sin = rope_tables(torch.arange(tokens, device=DEVICE) * 37, inv_freq, 1.0, dtype)
    weight = random(dim, dtype=dtype, seed=2) if norm else None
    want = ref_apply_rope(ref_rms_norm(flat, weight, 1e-6) if norm else flat, cos, sin)
    got = head_norm_rope_kernel(flat, weight, cos, sin, 1e-6)
    tolerance = {"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else TOLERANCE[dtype]
    torch.testing.assert_close(got, want, **tolerance)
    head_norm_rope_kernel(flat, weight, cos, sin, 1e-6, out=flat)  # in place
    torch.testing.assert_close(flat, want, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4), (7, 100), (2, 1500), (0, 8)])
def test_swiglu(rows, width, dtype):
    from moe_prefill.ops.kernels.swiglu import swiglu_kernel

    x = random(rows, 2 * width, dtype=dtype)
    torch.testing.assert_close(swiglu_kernel(x), ref_swiglu(x), **TOLERANCE[dtype])


@pytest.mark.parametrize("before", ["nothing", "swiglu", "norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 100), (2, 1500), (0, 8)])
def test_quantize(rows, width, dtype, before):
    from moe_prefill.ops.kernels.quantize import quantize_rows_kernel, swiglu_quantize_kernel
    from moe_prefill.ops.kernels.rms_norm import rms_norm_quantize_kernel

    if before != "nothing" and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter cuts bfloat16 where the hardware rounds, which moves values to other steps")
    x, weight = random(rows, width * (1 + (before == "swiglu")), dtype=dtype), random(width, dtype=dtype, seed=1)

    def norm(x):
        out = Float8Rows.empty(rows, width, DEVICE)
        rms_norm_quantize_kernel(x, weight, 1e-6, out.values, out.scale)
        return out.values, out.scale

    kernel, plain = {
        "nothing": (quantize_rows_kernel, lambda x: x),
        "swiglu": (swiglu_quantize_kernel, ref_swiglu),
        "norm": (norm, lambda x: ref_rms_norm(x, weight, 1e-6)),
    }[before]
    assert_quantised(kernel(x), plain(x))


def assert_quantised(got, rows):
    (values, scale), (want, want_scale) = got, ref_quantize_rows(rows)
    torch.testing.assert_close(scale, want_scale, rtol=1e-2, atol=0)
    got, wanted = values.float(), want.float()
    if got.device.type == "cpu":
        # The interpreter loses the carry of a rounding that reaches the next power of two.
        carried = torch.frexp(wanted).mantissa.abs() == 0.5
        got = torch.where(carried, wanted, got)
    torch.testing.assert_close(got, wanted, rtol=0.13, atol=2.0**-8)  # one step of e4m3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 8), (6, 3, 40), (4, 8, 2100)])
def test_combine(tokens, top_k, width, dtype):
    from moe_prefill.ops.kernels.combine import combine_kernel

    rows = random(tokens * top_k, width, dtype=dtype)
    slots = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(3)).view(tokens, top_k).to(DEVICE)
    slots[0, 0] = -1  # of no row here
    weights, residual = random(tokens, top_k, dtype=dtype, seed=4), random(tokens, width, dtype=dtype, seed=5)
    want = ref_combine(rows, slots, weights, residual)
    torch.testing.assert_close(combine_kernel(rows, slots, weights, residual), want, **TOLERANCE[dtype])
    combine_kernel(rows, slots, weights, residual, out=residual)  # in place
    torch.testing.assert_close(residual, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 8), (6, 3, 40), (4, 8, 2100), (0, 2, 16)])
def test_combine_and_norm(tokens, top_k, width, float8, dtype):
    from moe_prefill.ops.kernels.combine import combine_kernel, combine_rms_norm_kernel
    from moe_prefill.ops.kernels.rms_norm import rms_norm_kernel, rms_norm_quantize_kernel

    rows, norm = random(tokens * top_k, width, dtype=dtype), random(width, dtype=dtype, seed=6)
    slots = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(3)).view(tokens, top_k).to(DEVICE)
    slots[:1, 0] = -1  # of no row here
    weights, wide = random(tokens, top_k, dtype=dtype, seed=4), random(tokens, 2 * width, dtype=dtype, seed=5)
    residual, beside = wide[:, width:], wide[:, :width].clone()
    want, want_normed = ref_combine_rms_norm(rows, slots, weights, residual, norm, 1e-6)
    alone = combine_kernel(rows, slots, weights, residual)
    quantised = Float8Rows.empty(tokens, width, DEVICE)
    kept = (quantised.values, quantised.scale) if float8 else (torch.empty_like(want), None)
    combine_rms_norm_kernel(rows, slots, weights, residual, norm, 1e-6, *kept, out=residual)  # rows of a wider buffer
    torch.testing.assert_close(residual, want, **TOLERANCE[dtype])
    assert torch.equal(wide[:, :width], beside)
    assert torch.equal(residual, alone), "the same rows as without a norm"
    if not float8:
        torch.testing.assert_close(kept[0], want_normed, **TOLERANCE[dtype])
        assert torch.equal(kept[0], rms_norm_kernel(residual, norm, 1e-6)), "the norm of what was written"
        return
    again = Float8Rows.empty(tokens, width, DEVICE)
    rms_norm_quantize_kernel(residual, norm, 1e-6, again.values, again.scale)
    assert torch.equal(quantised.values.view(torch.uint8), again.values.view(torch.uint8))
    assert torch.equal(quantised.scale, again.scale)
    if dtype == torch.float32 or DEVICE.type == "cuda":  # the interpreter cuts bfloat16: values move to other steps
        assert_quantised(kept, want_normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[0, 0, 5], [70, 0, 1, 64], [3], [0, 130, 0, 0]])
def test_grouped_mm(counts, dtype):
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter multiplies the bit patterns of bfloat16 matrices")
    from moe_prefill.ops.kernels.grouped import grouped_mm_kernel

    ends = torch.tensor(counts).cumsum(0).to(torch.int32).to(DEVICE)
    rows, weight = random(sum(counts), 40, dtype=dtype), random(len(counts), 72, 40, dtype=dtype, seed=6)
    tolerance = {"rtol": 2e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(grouped_mm_kernel(rows, weight, ends), ref_grouped_mm(rows, weight, ends), **tolerance)
