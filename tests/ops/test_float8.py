"""Float8 with scales a row and a block: rounding, rows that do not see each other, products and experts against wide
ones.
"""

import importlib
import importlib.util
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill import ops
from moe_prefill.ops.block_experts import ALIGNMENT, aligned_rows, ref_block_grouped_mm
from moe_prefill.ops.experts import ref_experts
from moe_prefill.ops.grouped import ref_scaled_grouped_mm
from moe_prefill.ops.linear import _aligned
from moe_prefill.ops.quantize import (
    FLOAT8_MAX,
    quantize_groups,
    ref_quantize_groups,
    ref_quantize_rows,
    swiglu_quantize_groups,
)

from .test_ops import DEVICE, random


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_within_half_a_step(dtype):
    x = random(37, 96, dtype=dtype) * torch.logspace(-6, 4, 37, device=DEVICE)[:, None].to(dtype)
    values, scale = ops.quantize_rows(x)
    want, want_scale = ref_quantize_rows(x)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
    assert (values.float() - want.float()).abs().max() <= 32, "at most one step of the largest binade"
    back = ops.dequantize(values, scale, torch.float32)
    # e4m3 keeps three bits after the leading one; the smallest step is 2^-9 of the scaled row.
    allowed = torch.maximum(x.float().abs() / 16, scale[:, None] * 2.0**-10) * 1.001
    assert ((back - x.float()).abs() <= allowed).all()


def test_the_largest_value_is_exact_and_a_row_of_zeros_stays_zero():
    x = torch.tensor([[0.0, 1.0, -2.0], [0.0, 0.0, 0.0]], device=DEVICE)
    values, scale = ops.quantize_rows(x)
    assert values.float().tolist() == [[0.0, 224.0, -FLOAT8_MAX], [0.0, 0.0, 0.0]]
    assert ops.dequantize(values, scale, torch.float32).tolist() == [[0.0, 1.0, -2.0], [0.0, 0.0, 0.0]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.floats(-11, 37), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_values_are_nearest_to_the_quotient_up_to_the_last_bits(seed, exponent, dtype):
    x = random(8, 200, dtype=torch.float32, seed=seed)
    x = (x / x.abs().amax(-1, keepdim=True) * 10.0**exponent).to(dtype)
    values, scale = ops.quantize_rows(x)
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    every = every[(every & 0x7F) != 0x7F].view(ops.FLOAT8).double()
    quotient = x.double() / scale.double()[:, None]
    nearest = (quotient[..., None] - every).abs().amin(-1)
    assert ((values.double() - quotient).abs() <= nearest + quotient.abs() * 2.0**-21).all()
    assert (values.float().abs().amax(-1) == FLOAT8_MAX).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "quantize", [ops.quantize_rows, quantize_groups, lambda x: ops.swiglu_quantize(x.repeat(1, 2))]
)
def test_what_is_not_finite_stays_so(quantize, value):
    x = random(3, 256)
    x[1, 200] = value
    values, _ = quantize(x)
    assert values.float().isnan().any(1).tolist() == [False, True, False]


def test_a_row_does_not_depend_on_its_neighbours():
    x = random(16, 64, dtype=torch.bfloat16)
    whole, scale = ops.quantize_rows(x)
    alone, alone_scale = ops.quantize_rows(x[5:6])
    assert torch.equal(whole[5:6].view(torch.uint8), alone.view(torch.uint8))
    assert torch.equal(scale[5:6], alone_scale)


def test_swiglu_and_quantisation_in_one_pass():
    x = random(29, 2 * 48, dtype=torch.bfloat16)
    values, scale = ops.swiglu_quantize(x)
    want, want_scale = ref_quantize_rows(ops.swiglu(x))
    torch.testing.assert_close(scale, want_scale, rtol=1e-2, atol=0)
    got = ops.dequantize(values, scale, torch.float32)
    torch.testing.assert_close(got, ops.dequantize(want, want_scale, torch.float32), rtol=0.13, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "size", "hidden"), [(5, 48, 64), (3, 16, 32), (4, 40, 72)])
def test_experts_in_float8(dtype, experts, size, hidden):
    """Against the same quantised weights and wide activations: what is left is the rounding of activations."""
    tokens, top_k = 41, 2
    x, base = random(tokens, hidden, dtype=dtype), random(tokens, hidden, dtype=dtype, seed=9)
    gate_up = ops.quantize_rows(random(experts * 2 * size, hidden, seed=1) * 0.2)
    down = ops.quantize_rows(random(experts * hidden, size, seed=2) * 0.2)
    weights = torch.rand(tokens, top_k, device=DEVICE).to(dtype)
    ids = torch.from_numpy(
        np.random.default_rng(0).permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :top_k]
    )
    ids = ids.to(DEVICE)
    shapes = (experts, 2 * size, hidden), (experts, hidden, size)
    values = [q.view(shape) for (q, _), shape in zip((gate_up, down), shapes, strict=True)]
    scales = [s.view(shape[:2]) for (_, s), shape in zip((gate_up, down), shapes, strict=True)]
    out = ops.experts(x, weights, ids, *values, base, scales=(scales[0], scales[1]))
    wide = [ops.dequantize(v, s, torch.float32) for v, s in zip(values, scales, strict=True)]
    want = base.float() + ref_experts(x.float(), weights, ids, *wide)
    error = (out.float() - want).norm() / want.norm()
    assert error < 0.05, error
    assert error > 0, "activations are rounded to float8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n", "c"), [(1, 16, 32), (33, 48, 80), (0, 16, 16), (7, 10, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows, n, c, bias, dtype):
    """Plain weights as torch has it; float8 ones near the product of what they stand for, into a new tensor or not."""
    x, weight = random(rows, c, dtype=dtype), random(n, c, dtype=dtype, seed=1)
    offset = random(n, dtype=dtype, seed=2) if bias else None
    assert torch.equal(ops.linear(x, weight, offset), F.linear(x, weight, offset))
    matrix = ops.Float8Rows.of(weight)
    want = F.linear(x.float(), matrix.wide(torch.float32), None if offset is None else offset.float())
    got = ops.linear(x, matrix, offset)
    assert got.dtype == dtype
    assert (got.float() - want).norm() <= 0.05 * want.norm(), "the rounding of activations"
    into = torch.empty_like(got)
    assert torch.equal(ops.linear(x, matrix, offset, into), got)
    assert torch.equal(into, got)
    some = slice(n // 2, n)  # part of a fused matrix
    part = ops.linear(x, matrix[some], None if offset is None else offset[some])
    torch.testing.assert_close(part.float(), got[:, some].float(), rtol=1e-2, atol=1e-2)


def test_a_device_without_float8_products_keeps_activations_wide(monkeypatch):
    for name in ("linear", "experts"):  # whose modules have the names of what they define
        module = importlib.import_module(f"moe_prefill.ops.{name}")
        monkeypatch.setattr(module, "has_float8", lambda device: False)
    x, matrix = random(9, 32), ops.Float8Rows.of(random(16, 32, seed=1))
    torch.testing.assert_close(ops.linear(x, matrix), F.linear(x, matrix.wide(torch.float32)), rtol=1e-5, atol=1e-5)
    gate_up = [ops.quantize_rows(random(2 * 16, 32, seed=seed)) for seed in (2, 3)]
    down = [ops.quantize_rows(random(32, 16, seed=seed)) for seed in (4, 5)]
    values, scales = ([torch.stack([each[k] for each in part]) for part in (gate_up, down)] for k in (0, 1))
    ids = torch.randint(0, 2, (9, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights, base = torch.ones(9, 1, device=DEVICE), torch.zeros(9, 32, device=DEVICE)
    wide = [ops.dequantize(v, s, torch.float32) for v, s in zip(values, scales, strict=True)]
    got = ops.experts(x, weights, ids, *values, base, tuple(scales))
    torch.testing.assert_close(got, ref_experts(x, weights, ids, *wide), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plain_rows", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 70, 1), (0, 0, 0, 5), (64, 64, 1, 0)])
def test_float8_grouped_product(counts, plain_rows):
    rows, ends = random(sum(counts), 40), torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    values, scale = ops.quantize_rows(random(4 * 24, 40, seed=1))
    values, scale = values.view(4, 24, 40), scale.view(4, 24)
    taken = (rows, None) if plain_rows else ops.quantize_rows(rows)
    wide = rows if plain_rows else ops.dequantize(*taken, torch.float32)
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts)).to(DEVICE)
    want = torch.einsum("rc,rnc->rn", wide, ops.dequantize(values, scale, torch.float32)[expert])
    for product in (ref_scaled_grouped_mm, ops.scaled_grouped_mm):
        got = product(*taken, values, scale, ends, torch.float32)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [(3, 0, 70, 1), (64, 64, 1, 0)])
def test_float8_matrices_are_widened_in_the_kernel(counts):
    """Every finite value of e4m3, those below 2^-6 included."""
    pytest.importorskip("triton")
    from moe_prefill.ops.kernels.grouped import grouped_mm_kernel

    every = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    every = every[(every & 0x7F) != 0x7F].view(ops.FLOAT8)
    values = every[torch.arange(4 * 24 * 40, device=DEVICE) % len(every)].view(4, 24, 40)
    scale = random(4, 24, seed=1).abs()
    rows, ends = random(sum(counts), 40), torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    want = ref_scaled_grouped_mm(rows, None, values, scale, ends, torch.float32)
    torch.testing.assert_close(grouped_mm_kernel(rows, values, ends, scale), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rows", "width"), [(1, 128), (5, 384), (3, 1536), (0, 256)])
def test_a_scale_for_each_128_channels(rows, width):
    x = random(rows, width) * torch.logspace(-3, 3, width, device=DEVICE)
    values, scale = quantize_groups(x)
    assert scale.shape == (width // 128, rows)
    for group in range(width // 128):
        part = slice(group * 128, (group + 1) * 128)
        want, want_scale = ref_quantize_rows(x[:, part])
        torch.testing.assert_close(scale[group], want_scale, rtol=1e-6, atol=0)
        assert ((values[:, part].float() - want.float()).abs() <= 32).all(), "one step of the largest binade"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(4, 128), (3, 640), (0, 128), (32, 384), (65, 256)])
@pytest.mark.parametrize("gated", [False, True])
def test_kernels_of_scales_for_128_channels(rows, width, dtype, gated):
    pytest.importorskip("triton")
    from moe_prefill.ops.kernels.quantize import quantize_groups_kernel, swiglu_quantize_groups_kernel

    if gated and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter cuts bfloat16 where the hardware rounds, which moves values to other steps")
    wide = random(rows, 2 * width, dtype=dtype)
    gate, up = wide[:, :width], wide[:, width:]
    values, scale = swiglu_quantize_groups_kernel(gate, up) if gated else quantize_groups_kernel(gate)
    want, want_scale = ref_quantize_groups(F.silu(gate) * up if gated else gate)
    torch.testing.assert_close(scale, want_scale, rtol=1e-2, atol=0)
    got, wanted = values.float(), want.float()
    if DEVICE.type == "cpu":
        # The interpreter loses the carry of a rounding that reaches the next power of two.
        got = torch.where(torch.frexp(wanted).mantissa.abs() == 0.5, wanted, got)
    torch.testing.assert_close(got, wanted, rtol=0.13, atol=2.0**-8)  # one step of e4m3


def test_swiglu_with_a_scale_for_each_128_channels():
    wide = random(5, 512)
    values, scale = swiglu_quantize_groups(wide[:, :256], wide[:, 256:])
    want, want_scale = ref_quantize_groups(ops.swiglu(wide))
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    assert ((values.float() - want.float()).abs() <= 32).all()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 300), c=st.integers(1, 300), parts=st.sampled_from([1, 2]), stack=st.sampled_from([(), (3,)]))
def test_blocks_come_back_within_half_a_step(n, c, parts, stack):
    generator = torch.Generator().manual_seed(n * 301 + c)
    matrices = [torch.randn(*stack, n, c, generator=generator) * 10.0**k for k in range(parts)]
    quantised = [ops.quantize_blocks(matrix) for matrix in matrices]
    values, scale = (torch.cat([each[k] for each in quantised], dim=-2) for k in (0, 1))
    assert scale.shape == (*stack, parts * math.ceil(n / 128), math.ceil(c / 128))
    back, want = ops.dequantize_blocks(values, scale, parts), torch.cat(matrices, dim=-2)
    allowed = torch.maximum(want.abs() / 16, scale.amax() * 2.0**-10) * 1.001
    assert ((back - want).abs() <= allowed).all()
    for part in range(parts):
        rows = slice(part * n, (part + 1) * n)
        first = back[..., rows, :][..., :128, :128]
        corner = scale[..., part * math.ceil(n / 128), 0][..., None, None]
        assert torch.equal(first, values[..., rows, :][..., :128, :128].float() * corner)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 300), experts=st.integers(1, 9), data=st.data())
def test_aligned_rows(tokens, experts, data):
    """Every choice has a row of its own among its expert's; each expert's begin at a multiple of 128, in order."""
    top_k = data.draw(st.integers(1, experts))
    seed, elsewhere = data.draw(st.integers(0, 999)), data.draw(st.integers(0, 2))
    scores = torch.rand(tokens, experts + elsewhere, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    ids = scores.topk(top_k).indices
    here = ids < experts
    count = int(here.sum())
    if not count:
        return
    rows = aligned_rows(ids, experts, count if elsewhere else None)
    at = rows.order.row_of_slot_TK
    assert (at[~here] == -1).all()
    assert at[here].unique().numel() == count
    assert torch.equal(rows.expert[at[here].long()].long(), ids[here])
    token = torch.arange(tokens, device=DEVICE)[:, None].expand_as(ids)
    assert torch.equal(rows.order.token_of_row_R[at[here].long()].long(), token[here])
    assert len(rows.expert) % ALIGNMENT == 0
    assert len(rows.expert) <= count + min(count, experts) * (ALIGNMENT - 1)
    runs = rows.expert.view(-1, ALIGNMENT)
    assert (runs == runs[:, :1]).all(), "a run of 128 rows is of one expert"
    order = runs[:, 0][runs[:, 0] >= 0]
    assert (order.diff() >= 0).all()
    slots = at.flatten()[ids.flatten().argsort(stable=True)]
    assert (slots[slots >= 0].diff() > 0).all(), "in the order of expert, then slot"


@pytest.mark.parametrize("elsewhere", [0, 2])
def test_experts_with_block_scales(elsewhere):
    experts, size, hidden, tokens, top_k = 5, 128, 256, 41, 3
    bank = torch.empty(experts, 3 * size * hidden, dtype=ops.FLOAT8, device=DEVICE)
    gate_up = bank[:, : 2 * size * hidden].view(experts, 2 * size, hidden)
    down = bank[:, 2 * size * hidden :].view(experts, hidden, size)
    scales = (
        torch.zeros(experts, 3, size // 128, hidden // 128, device=DEVICE),
        torch.zeros(experts, 3, hidden // 128, size // 128, device=DEVICE),
    )
    for values, grid, seed in ((gate_up, scales[0][:, :2].flatten(1, 2), 1), (down, scales[1][:, 2], 2)):
        # Blocks of very different sizes, so that a scale in the wrong place shows.
        sizes = torch.logspace(-1.5, 0, values[0].numel(), device=DEVICE).view(values.shape[1:])
        quantised, found = ops.quantize_blocks(random(*values.shape, seed=seed) * sizes)
        values.copy_(quantised)
        grid.copy_(found)
    wide = ops.dequantize_blocks(gate_up, scales[0][:, :2].flatten(1, 2)), ops.dequantize_blocks(down, scales[1][:, 2])
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # DeepGEMM writes nothing else
    x, base = random(tokens, hidden).to(dtype), random(tokens, hidden, seed=9).to(dtype)
    scores = torch.rand(tokens, experts + elsewhere, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids, weights = scores.topk(top_k).indices, torch.rand(tokens, top_k, device=DEVICE)
    num_rows = int((ids < experts).sum()) if elsewhere else None
    got = ops.experts(x, weights, ids, gate_up, down, base, scales, num_rows=num_rows)
    want = ref_experts(x.float(), weights, ids, *wide)
    error = (got.float() - base.float() - want).norm() / want.norm()
    assert 0 < error < 0.05, "activations are rounded to float8"


@pytest.mark.parametrize(
    ("hidden", "size", "dtype", "reason"),
    [(2048, 700, torch.bfloat16, "multiple of 128"), (2048, 768, torch.bfloat16, "no Hopper GPU")],
)
def test_what_block_scaled_experts_want(hidden, size, dtype, reason):
    assert reason in ops.blocks_refused(hidden, size, dtype, torch.device("cpu"))


def test_a_package_that_does_not_work_is_found_out_before_it_is_needed(monkeypatch):
    module = importlib.import_module("moe_prefill.ops.block_experts")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "deep_gemm" else find(name))

    def with_product(product) -> str | None:
        monkeypatch.setattr(module, "block_grouped_mm", product)
        return module._deep_gemm_fault.__wrapped__(DEVICE)

    def fails(*_):
        raise AssertionError("no\n nvcc")

    assert with_product(ref_block_grouped_mm) is None
    assert (
        with_product(lambda *arguments: 2 * ref_block_grouped_mm(*arguments)) == "sgl-deep-gemm multiplies wrongly here"
    )
    assert with_product(fails) == "sgl-deep-gemm does not work here: no nvcc"


def test_scales_of_any_slice_begin_where_a_product_takes_them():
    scale = torch.arange(9, dtype=torch.float32, device=DEVICE)
    for start in range(6):
        aligned = _aligned(scale[start:])
        assert aligned.data_ptr() % 16 == 0
        assert torch.equal(aligned, scale[start:])
    assert _aligned(scale[4:]).data_ptr() == scale[4:].data_ptr()
