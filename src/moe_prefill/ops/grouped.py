"""Matrix product of grouped rows, each group with its own matrix. R rows, C input channels, N output channels, E
groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import triton_enabled


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
    if rows_RC.dtype == torch.bfloat16 and _aligned(rows_RC, weight_ENC):
        return F.grouped_mm(rows_RC, weight_ENC.transpose(1, 2), offs=ends_E)
    if triton_enabled():
        from .kernels.grouped import grouped_mm_kernel

        return grouped_mm_kernel(rows_RC, weight_ENC, ends_E)
    return ref_grouped_mm(rows_RC, weight_ENC, ends_E)


def _aligned(rows_RC: torch.Tensor, weight_ENC: torch.Tensor) -> bool:
    """torch's grouped matmul wants rows of 16 bytes."""
    return rows_RC.shape[1] % 8 == 0 and weight_ENC.shape[1] % 8 == 0
