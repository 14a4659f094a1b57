"""Float8 with a scale a row: rounding, rows that do not see each other, experts against wide ones."""

import numpy as np
import pytest
import torch

from moe_prefill import ops
from moe_prefill.ops.experts import ref_experts
from moe_prefill.ops.quantize import FLOAT8_MAX, ref_quantize_rows

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
