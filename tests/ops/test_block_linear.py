"""Linear maps with a scale for each block of 128 x 128: the product of what values and scales stand for."""

import pytest
import torch
import torch.nn.functional as F

from moe_prefill import ops
from moe_prefill.ops import block_linear
from moe_prefill.ops.block_linear import BlockKernel, block_mm, ref_block_mm
from moe_prefill.ops.quantize import dequantize_blocks, quantize_groups

from .test_ops import random


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def uneven(n: int, c: int) -> torch.Tensor:
    """A weight whose blocks have very different sizes, so that a scale in the wrong place shows."""
    sizes = torch.logspace(-2, 2, n // 128 * (c // 128)).view(n // 128, c // 128)
    return random(n, c, seed=1).cpu() * sizes.repeat_interleave(128, 0).repeat_interleave(128, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_near_the_product_of_what_the_blocks_stand_for(rows, bias, dtype):
    x, weight = random(rows, 256, dtype=dtype).cpu(), ops.Float8Blocks.of(uneven(384, 256))
    offset = random(384, dtype=dtype, seed=2).cpu() if bias else None
    got = ops.linear(x, weight, offset)
    assert (got.dtype, got.shape) == (dtype, (rows, 384))
    if rows:
        want = F.linear(x.float(), weight.wide(torch.float32), None if offset is None else offset.float())
        assert 0 < relative(got, want) < 0.05, "the rounding of activations"
    into = torch.empty_like(got)
    assert ops.linear(x, weight, offset, into) is into
    assert torch.equal(into, got)


def test_the_reference_by_hand():
    """Rows of ones with scales 2 and 3 for their two groups of 128 channels; blocks of ones with scales 1, 10, 100 and
    1000: 128 * (2 * 1 + 3 * 10) and 128 * (2 * 100 + 3 * 1000).
    """
    ones = torch.ones(256, 256).to(ops.FLOAT8)
    weight = ops.Float8Blocks(ones, torch.tensor([[1.0, 10.0], [100.0, 1000.0]]))
    scale_GR = torch.tensor([[2.0], [3.0]])
    got = ref_block_mm(ones[:1], scale_GR, weight, torch.float32)
    assert got[0, :128].unique().tolist() == [128 * 32]
    assert got[0, 128:].unique().tolist() == [128 * 3200]
    assert torch.equal(block_mm(ones[:1], scale_GR, weight, torch.empty(1, 256)), got)


def test_parts_of_a_fused_matrix_are_whole_blocks():
    x, weight = random(5, 256).cpu(), ops.Float8Blocks.of(uneven(384, 256))
    whole = ops.linear(x, weight)
    part = weight[128:]
    assert (len(part), part.shape, part.nbytes) == (256, (256, 256), 256 * 256 + 4 * 4)
    torch.testing.assert_close(ops.linear(x, part), whole[:, 128:])
    with pytest.raises(AssertionError):
        weight[64:]


def test_published_blocks_are_nearer_than_rows_made_of_them():
    """What keeping them is for: scales of rows round each value once more."""
    wide, x = random(512, 1024, seed=1).cpu(), random(64, 1024).cpu()
    want = F.linear(x, wide)
    published = ops.Float8Blocks.of(wide)
    again = ops.Float8Rows.of(published.wide(torch.float32))
    kept, made = relative(ops.linear(x, published), want), relative(ops.linear(x, again), want)
    assert kept < 0.04
    assert kept < 0.9 * made


def test_a_norm_in_front_leaves_rows_plain():
    x, weight = random(3, 256).cpu(), ops.Float8Blocks.of(uneven(128, 256))
    normed = ops.rms_norm_for(x, torch.ones(256), 1e-6, weight)
    assert torch.equal(normed, ops.rms_norm(x, torch.ones(256), 1e-6))
    residual = torch.zeros(3, 128)
    ops.linear_add_rms_norm_(normed, weight, None, residual, torch.ones(128), 1e-6)
    values, scale_GR = quantize_groups(normed)
    want = (values.float() * scale_GR.t().repeat_interleave(128, 1)) @ dequantize_blocks(
        weight.values, weight.scale
    ).t()
    torch.testing.assert_close(residual, want)


def test_the_kernels_of_a_gpu_are_tried_before_anything_depends_on_them(monkeypatch):
    """A kernel that multiplies wrongly, one that raises, one that takes whole tiles only, one whose package is missing,
    and a good one.
    """

    def good(rows, scale, weight, out):
        out.copy_(ref_block_mm(rows, scale, weight, out.dtype))

    def wrong(rows, scale, weight, out):
        out.copy_(ref_block_mm(rows, scale.flip(0), weight, out.dtype))

    def broken(rows, scale, weight, out):
        raise RuntimeError("no\nkernel image")

    def whole(rows, scale, weight, out):
        if len(rows) % 128:
            raise RuntimeError("not supported")
        good(rows, scale, weight, out)

    cpu = torch.device("cpu")
    tried = (("a", wrong), ("b", broken), ("c", whole), ("d", good, "no_such_package"), ("e", good))
    kernels = [BlockKernel(*each) for each in tried]
    assert [kernel.refusal(cpu) for kernel in kernels] == [
        "it multiplies 128 rows wrongly",
        "it does not multiply 128 rows here: no kernel image",
        "it does not multiply 130 rows here: not supported",
        "no_such_package is not installed",
        None,
    ]
    monkeypatch.setattr(block_linear, "KERNELS", kernels)
    assert block_linear.chosen.__wrapped__(cpu).name == "e"


def cublaslt(rows, weight, *, scale_a, scale_recipe_a, scale_b, scale_recipe_b, output_dtype):
    """``scaled_mm`` as cuBLASLt computes it, which refuses the layouts that cuBLASLt does."""
    (count, c), n = rows.shape, weight.shape[1]
    assert count % 4 == 0, count
    assert (rows.stride(), weight.stride()) == ((c, 1), (1, c))
    groups, blocks = c // 128, -(-c // 512) * 4
    assert (scale_a.shape, scale_b.shape) == ((count, groups), (blocks, n // 128))
    for along, scale in ((count, scale_a), (blocks, scale_b)):
        assert scale.stride() == (1, along) or (scale.shape[1] == 1 and scale.stride() == (1, 1))
    assert (scale_recipe_a, scale_recipe_b) == (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
    matrix = ops.Float8Blocks(weight.t(), scale_b[:groups].t())
    return ref_block_mm(rows, scale_a.t(), matrix, output_dtype)


@pytest.mark.parametrize("rows", [1, 3, 15, 16, 17, 130])
@pytest.mark.parametrize(("n", "c"), [(128, 128), (256, 640)])
def test_any_number_of_rows_is_laid_out_as_cublaslt_wants(rows, n, c, monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", cublaslt)
    values, scale_GR = quantize_groups(random(rows, c).cpu())
    weight, out = ops.Float8Blocks.of(uneven(n, c)), torch.full((rows, n), torch.nan)
    block_linear._torch(values, scale_GR, weight, out)
    assert relative(out, ref_block_mm(values, scale_GR, weight, torch.float32)) < 1e-6


def test_rows_of_zeros_are_added_only_where_rows_are_missing():
    values, scale_GR = torch.arange(1, 1 + 3 * 256).view(3, 256).remainder(7).to(ops.FLOAT8), torch.ones(2, 3)
    padded, scale = block_linear._filled_up(values, scale_GR)
    assert (padded.shape, padded.dtype, scale.shape) == ((4, 256), ops.FLOAT8, (2, 4))
    assert torch.equal(padded[:3].float(), values.float())
    assert (padded[3:].float().unique().tolist(), scale.sum(1).tolist()) == ([0.0], [3.0, 3.0])
    whole = block_linear._filled_up(padded, scale)
    assert whole[0] is padded
    assert whole[1] is scale


def test_a_cpu_multiplies_blocks_in_plain_torch():
    cpu = torch.device("cpu")
    assert ops.block_linear_refused(torch.float32, cpu) is None
    assert ops.block_linear_kernel(cpu) == "plain"
