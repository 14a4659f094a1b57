"""A linear map in float8 with a scale for each block of 128 x 128, as checkpoints are published. R rows, N output and C
input channels, G groups of 128 channels, n and c rows and columns of blocks.

Its input is quantised with a scale for each 128 channels of a row. On a Hopper GPU the product is DeepGEMM's (package
``sgl-deep-gemm``) or, without it, cuBLASLt's through torch; a CPU computes the same numbers in plain torch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import choice
from .quantize import BLOCK, FLOAT8, dequantize_blocks, quantize_blocks, quantize_groups

VARIABLE = "MOE_PREFILL_BLOCK_LINEAR"


@dataclass(frozen=True, slots=True, eq=False)
class Float8Blocks:
    """A weight of float8 ``values`` [N, C] with a float32 ``scale`` [n, c]; N and C are multiples of 128."""

    values: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        assert self.values.dtype == FLOAT8, self.values.dtype
        assert self.values.shape == tuple(BLOCK * size for size in self.scale.shape), (
            self.values.shape,
            self.scale.shape,
        )

    @classmethod
    def of(cls, weight_NC: torch.Tensor) -> Float8Blocks:
        """A quantised weight."""
        return cls(*quantize_blocks(weight_NC))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Float8Blocks:
        """Whole blocks of rows."""
        first, last, step = rows.indices(len(self))
        assert first % BLOCK == last % BLOCK == 0 < step == 1, rows
        return Float8Blocks(self.values[rows], self.scale[first // BLOCK : last // BLOCK])

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def wide(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix that the values and scales stand for, rounded once."""
        return dequantize_blocks(self.values, self.scale).to(dtype)


def ref_block_mm(
    rows_RC: torch.Tensor, scale_GR: torch.Tensor, weight_NC: Float8Blocks, dtype: torch.dtype
) -> torch.Tensor:
    """The product of what values and scales stand for, summed in float32 and rounded once; [R, N]."""
    wide_RC = rows_RC.float() * scale_GR.t().repeat_interleave(BLOCK, dim=1)
    return (wide_RC @ weight_NC.wide(torch.float32).t()).to(dtype)


def block_mm(
    rows_RC: torch.Tensor, scale_GR: torch.Tensor, weight_NC: Float8Blocks, out_RN: torch.Tensor
) -> torch.Tensor:
    """``ref_block_mm`` into ``out_RN``, by the chosen kernel on a GPU."""
    if not rows_RC.is_cuda:
        return out_RN.copy_(ref_block_mm(rows_RC, scale_GR, weight_NC, out_RN.dtype))
    if len(rows_RC):
        chosen(rows_RC.device).run(rows_RC, scale_GR, weight_NC, out_RN)
    return out_RN


def block_linear(
    x_RC: torch.Tensor, weight_NC: Float8Blocks, bias_N: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias``; [R, N] in the dtype of ``x``, new or in ``out``. The bias is added to the rounded
    product.
    """
    if out is None:
        out = x_RC.new_empty(len(x_RC), len(weight_NC))
    product = block_mm(*quantize_groups(x_RC), weight_NC, out)
    return product if bias_N is None else product.add_(bias_N)


@dataclass(frozen=True, slots=True)
class BlockKernel:
    """``run(rows, scale, weight, out)`` fills ``out``. ``package``: what it needs beside torch."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, Float8Blocks, torch.Tensor], object]
    package: str | None = None

    def refusal(self, device: torch.device) -> str | None:
        """Why it does not run on a Hopper GPU, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return _fault(self, device)


def block_linear_refused(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why block-scaled linear maps are not computed on a device as they are; None: they are."""
    if device.type == "cpu":
        return None
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "the device is no Hopper GPU"
    if dtype != torch.bfloat16:
        return f"activations are {dtype}, not bfloat16"
    found = {kernel.name: kernel.refusal(device) for kernel in KERNELS}
    return None if None in found.values() else "; ".join(f"{name}: {why}" for name, why in found.items())


def block_linear_kernel(device: torch.device) -> str:
    """The name of what multiplies there, where it is not refused."""
    return "plain" if device.type == "cpu" else chosen(device).name


@functools.cache
def chosen(device: torch.device) -> BlockKernel:
    """The kernel on a Hopper GPU; see ``choice.choose``."""
    return choice.choose(KERNELS, lambda kernel: kernel.refusal(device), VARIABLE)


def _deep_gemm(rows_RC: torch.Tensor, scale_GR: torch.Tensor, weight_NC: Float8Blocks, out_RN: torch.Tensor) -> None:
    import deep_gemm

    weight = (weight_NC.values, weight_NC.scale)
    deep_gemm.fp8_gemm_nt((rows_RC, scale_GR.t()), weight, out_RN, compiled_dims="nk")


_ROWS = 4  # cuBLASLt takes multiples of four rows only, so that each group's scales begin at 16 bytes


def _filled_up(rows_RC: torch.Tensor, scale_GR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and scales with rows of zeros up to a multiple of ``_ROWS``; as they are where there is none to add."""
    missing = -len(rows_RC) % _ROWS
    if not missing:
        return rows_RC, scale_GR
    padded = F.pad(rows_RC.view(torch.uint8), (0, 0, 0, missing)).view(rows_RC.dtype)  # bytes: any device pads those
    return padded, F.pad(scale_GR, (0, missing))


def _torch(rows_RC: torch.Tensor, scale_GR: torch.Tensor, weight_NC: Float8Blocks, out_RN: torch.Tensor) -> None:
    """cuBLASLt wants the scales of rows along the rows without a gap, and those of blocks along the input channels,
    their number rounded up to a multiple of four.
    """
    rows, scale = _filled_up(rows_RC, scale_GR)
    grid_nc = F.pad(weight_NC.scale, (0, -weight_NC.scale.shape[1] % 4))
    product = F.scaled_mm(
        rows,
        weight_NC.values.t(),
        scale_a=scale.t(),
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=grid_nc.t(),
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=out_RN.dtype,
    )
    out_RN.copy_(product[: len(out_RN)])


# On one H200 (2026-11-24) cuBLASLt's product takes 1,090 to 1,240 TFLOP/s at the shapes of Qwen3 (fp8_ops.json).
KERNELS = (BlockKernel("deep-gemm", _deep_gemm, "deep_gemm"), BlockKernel("torch", _torch))


@functools.cache
def _fault(kernel: BlockKernel, device: torch.device) -> str | None:
    """Why a kernel does not work here, found out before anything depends on it: a whole tile of rows and then two more,
    which fill none, through two by two blocks that differ.
    """
    values = torch.ones(2 * BLOCK, 2 * BLOCK, device=device).to(FLOAT8)
    weight = Float8Blocks(values, torch.tensor([[1.0, 2.0], [4.0, 8.0]], device=device))
    for count in (BLOCK, BLOCK + 2):
        rows, scale_GR = values[:count], torch.tensor([[1.0], [2.0]], device=device).repeat(1, count)
        out = torch.empty(count, 2 * BLOCK, dtype=torch.bfloat16, device=device)
        try:
            kernel.run(rows, scale_GR, weight, out)
            if not torch.equal(out, ref_block_mm(rows, scale_GR, weight, out.dtype)):
                return f"it multiplies {count} rows wrongly"
        except Exception as problem:  # whatever it is, it is said in the log
            return f"it does not multiply {count} rows here: {' '.join(str(problem).split())[:200]}"
    return None
