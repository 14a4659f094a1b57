"""Matrix product of grouped rows, each group with its own matrix. R rows, C input channels, N output channels, E
groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import triton_enabled
from .quantize import FLOAT8


def ref_grouped_mm(rows_RC: torch.Tensor, weight_ENC: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Rows ``ends[e - 1]:ends[e]`` times ``weight[e]`` transposed; [R, N]. Reads the group ends on the host."""
    out = torch.empty(len(rows_RC), weight_ENC.shape[1], dtype=rows_RC.dtype, device=rows_RC.device)
    begin = 0
    for group, end in enumerate(ends_E.tolist()):
        if end > begin:
            torch.mm(rows_RC[begin:end], weight_ENC[group].t(), out=out[begin:end])
        begin = end
    return out


def grouped_mm(rows_RC: torch.Tensor, weight_ENC: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Grouped product [R, N]; ``ends_E`` int32, non-decreasing, its last entry R. No host synchronisation on CUDA.

    bfloat16 on CUDA goes to torch's grouped matmul, other dtypes to a Triton kernel; on a CPU each group is one
    matmul that uses every core.
    """
    assert rows_RC.shape[1] == weight_ENC.shape[2], (rows_RC.shape, weight_ENC.shape)
    assert len(ends_E) == len(weight_ENC), (ends_E.shape, weight_ENC.shape)
    if not rows_RC.is_cuda:
        return ref_grouped_mm(rows_RC, weight_ENC, ends_E)
    if rows_RC.dtype == torch.bfloat16 and _aligned(rows_RC, weight_ENC, 8):
        return F.grouped_mm(rows_RC, weight_ENC.transpose(1, 2), offs=ends_E)
    if triton_enabled():
        from .kernels.grouped import grouped_mm_kernel

        return grouped_mm_kernel(rows_RC, weight_ENC, ends_E)
    return ref_grouped_mm(rows_RC, weight_ENC, ends_E)


def ref_scaled_grouped_mm(
    rows_RC: torch.Tensor,
    row_scale_R: torch.Tensor | None,
    weight_ENC: torch.Tensor,
    weight_scale_EN: torch.Tensor,
    ends_E: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``scaled_grouped_mm``, widening one group's rows and matrix at a time. Reads the group ends on the host."""
    out = torch.empty(len(rows_RC), weight_ENC.shape[1], dtype=dtype, device=rows_RC.device)
    begin = 0
    for group, end in enumerate(ends_E.tolist()):
        if end > begin:
            product = rows_RC[begin:end].float() @ weight_ENC[group].float().t()
            if row_scale_R is not None:
                product *= row_scale_R[begin:end, None]
            out[begin:end] = product.mul_(weight_scale_EN[group])
        begin = end
    return out


def scaled_grouped_mm(
    rows_RC: torch.Tensor,
    row_scale_R: torch.Tensor | None,
    weight_ENC: torch.Tensor,
    weight_scale_EN: torch.Tensor,
    ends_E: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The grouped product of float8 rows and float8 matrices, each with a float32 scale a row; [R, N] in ``dtype``.
    Rows may come wide, without scales.

    On a GPU with float8 units torch's row-wise scaled grouped matmul, on others and for other shapes a Triton kernel
    that widens tiles; on a CPU each group's matrix is widened when its turn comes.
    """
    assert weight_ENC.dtype == FLOAT8, weight_ENC.dtype
    assert (rows_RC.dtype == FLOAT8) == (row_scale_R is not None), rows_RC.dtype
    fits = rows_RC.is_cuda and dtype == torch.bfloat16 and _aligned(rows_RC, weight_ENC, 16)
    if row_scale_R is not None and fits and has_float8(rows_RC.device):
        out: torch.Tensor = torch.ops.aten._scaled_grouped_mm(
            rows_RC,
            weight_ENC.transpose(1, 2),
            row_scale_R,
            weight_scale_EN,
            ends_E,
            out_dtype=dtype,
            use_fast_accum=True,
        )
        return out
    if not (rows_RC.is_cuda and triton_enabled()):
        return ref_scaled_grouped_mm(rows_RC, row_scale_R, weight_ENC, weight_scale_EN, ends_E, dtype)
    from .kernels.grouped import grouped_mm_kernel

    if row_scale_R is None:
        return grouped_mm_kernel(rows_RC, weight_ENC, ends_E, weight_scale_EN).to(dtype)
    return grouped_mm_kernel(rows_RC.float(), weight_ENC, ends_E, weight_scale_EN).mul_(row_scale_R[:, None]).to(dtype)


def has_float8(device: torch.device) -> bool:
    """Whether a GPU multiplies float8 matrices with row-wise scales in groups (Hopper and later). A CPU computes what
    such a GPU computes, so that what float8 costs in accuracy can be seen without one.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _aligned(rows_RC: torch.Tensor, weight_ENC: torch.Tensor, elements: int) -> bool:
    """torch's grouped matmuls want rows of 16 bytes, which are so many ``elements``."""
    return rows_RC.shape[1] % elements == 0 and weight_ENC.shape[1] % elements == 0
