"""The routed experts of one layer in float8 with block scales. T tokens, K top-k, E experts, D channels, I expert
channels, R = T K rows, M rows with alignment, G groups of 128 channels.

Products are those of DeepGEMM (package ``sgl-deep-gemm``, Hopper): activations with a scale for each 128 channels of a
row, weights with one for each 128 x 128 block, which is how checkpoints are published. Its rows come in groups that
begin at multiples of 128; the rows in between are computed and never read. A bank is E times gate, up and down without
gaps: 3 E matrices of equal size, of which a product takes every third.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch

from .backend import triton_enabled
from .permute import ExpertOrder, order_by_expert, permute
from .quantize import BLOCK, FLOAT8, dequantize_blocks, quantize_groups, swiglu_quantize_groups

ALIGNMENT = 128  # rows; DeepGEMM's contiguous layout


@dataclass(frozen=True, slots=True, eq=False)
class AlignedRows:
    """``order`` with each expert's rows from a multiple of ``ALIGNMENT`` on: M rows, those in between of token 0.
    ``expert`` int32 [M]: whose a row is, -1 behind the last expert's.
    """

    order: ExpertOrder
    expert: torch.Tensor


def aligned_rows(ids_TK: torch.Tensor, num_experts: int, num_rows: int | None = None) -> AlignedRows:
    """Two tokens, ids [1, 0] and [1, 2], three experts: rows 0, 128, 129 and 256 are those of tokens 0, 0, 1 and 1.

    M depends on shapes only: nothing is read on the host. ``num_rows`` as in ``order_by_expert``.
    """
    order = order_by_expert(ids_TK, num_experts, num_rows, ALIGNMENT)
    rows = torch.arange(len(order.token_of_row_R), device=ids_TK.device, dtype=torch.int32)
    expert = torch.searchsorted(order.ends_E, rows, right=True, out_int32=True)
    return AlignedRows(order, expert.masked_fill_(expert >= num_experts, -1))


@dataclass(frozen=True, slots=True, eq=False)
class BlockBank:
    """A bank as the products take it: 3 E matrices, of which every third is a gate, an up or a down projection.

    ``gate_up`` [3 E, I, D] and ``down`` [3 E, D, I] are the same bytes; their scales, float32 [3 E, I / 128, D / 128]
    and [3 E, D / 128, I / 128], mean something where the matrix is of that kind.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor

    @classmethod
    def of(
        cls, gate_up_E2ID: torch.Tensor, down_EDI: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor]
    ) -> BlockBank:
        """Views of experts without gaps; ``scales`` [E, 3, ...]."""
        E, D, I = down_EDI.shape
        assert gate_up_E2ID.stride() == (3 * I * D, D, 1), gate_up_E2ID.stride()
        assert down_EDI.stride() == (3 * I * D, I, 1), down_EDI.stride()
        start = down_EDI.storage_offset() - 2 * I * D
        return cls(
            gate_up_E2ID.as_strided((3 * E, I, D), (I * D, D, 1)),
            down_EDI.as_strided((3 * E, D, I), (D * I, I, 1), start),
            scales[0].flatten(0, 1),
            scales[1].flatten(0, 1),
        )

    def times_gate_up(
        self, rows_MD: torch.Tensor, scale_GM: torch.Tensor, expert_M: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up of each row, [M, I] each."""
        gate, up = (
            block_grouped_mm(rows_MD, scale_GM, self.gate_up, self.gate_up_scale, _matrix(expert_M, which), dtype)
            for which in (0, 1)
        )
        return gate, up

    def times_down(
        self, hidden_MI: torch.Tensor, scale_GM: torch.Tensor, expert_M: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """[M, D]."""
        return block_grouped_mm(hidden_MI, scale_GM, self.down, self.down_scale, _matrix(expert_M, 2), dtype)


def block_experts_rows(
    x_TD: torch.Tensor,
    rows: AlignedRows,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """What each row's expert makes of its token; [M, D], undefined in between.

    ``scales`` float32 [E, 3, I / 128, D / 128] and [E, 3, D / 128, I / 128]: those of gate and up in the first two
    places, those of down in the third, so that a product finds them at the index of its matrix.
    """
    bank = BlockBank.of(gate_up_E2ID, down_EDI, scales)
    values_TD, scale_GT = quantize_groups(x_TD)
    rows_MD, scale_GM = permute(values_TD, rows.order), scale_GT.index_select(1, rows.order.token_of_row_R)
    hidden_MI, scale_GM = swiglu_quantize_groups(*bank.times_gate_up(rows_MD, scale_GM, rows.expert, x_TD.dtype))
    return bank.times_down(hidden_MI, scale_GM, rows.expert, x_TD.dtype)


def ref_block_grouped_mm(
    rows_MC: torch.Tensor,
    scale_GM: torch.Tensor,
    weight_BNC: torch.Tensor,
    weight_scale: torch.Tensor,
    matrix_M: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Each row times the matrix ``matrix_M`` [M] says, transposed; [M, N], zero where it says -1. Reads on the host."""
    out = torch.zeros(len(rows_MC), weight_BNC.shape[1], dtype=dtype, device=rows_MC.device)
    wide = rows_MC.float() * scale_GM.t().repeat_interleave(BLOCK, dim=1)
    for matrix in sorted(set(matrix_M.tolist())):
        if matrix >= 0:
            mine = matrix_M == matrix
            out[mine] = (wide[mine] @ dequantize_blocks(weight_BNC[matrix], weight_scale[matrix]).t()).to(dtype)
    return out


def block_grouped_mm(
    rows_MC: torch.Tensor,
    scale_GM: torch.Tensor,
    weight_BNC: torch.Tensor,
    weight_scale: torch.Tensor,
    matrix_M: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``ref_block_grouped_mm``, by DeepGEMM on a GPU; rows of -1 are undefined there. ``matrix_M`` int32 is the same
    within each run of ``ALIGNMENT`` rows.
    """
    if not rows_MC.is_cuda:
        return ref_block_grouped_mm(rows_MC, scale_GM, weight_BNC, weight_scale, matrix_M, dtype)
    import deep_gemm

    out = torch.empty(len(rows_MC), weight_BNC.shape[1], dtype=dtype, device=rows_MC.device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((rows_MC, scale_GM.t()), (weight_BNC, weight_scale), out, matrix_M)
    return out


def blocks_refused(hidden_size: int, expert_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why block-scaled experts of these sizes cannot be computed on a device as they are; None: they can."""
    if hidden_size % BLOCK or expert_size % BLOCK:
        return f"hidden size {hidden_size} or expert size {expert_size} is not a multiple of {BLOCK}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "the device is no Hopper GPU"
    if dtype != torch.bfloat16:
        return f"activations are {dtype}, not bfloat16"
    if not triton_enabled():
        return "Triton is not installed, or switched off"
    return _deep_gemm_fault(device)


@functools.cache
def _deep_gemm_fault(device: torch.device) -> str | None:
    """Why DeepGEMM does not work here, found out by a product of one block before anything depends on it."""
    if importlib.util.find_spec("deep_gemm") is None:
        return "the package sgl-deep-gemm is not installed"
    values, scale = torch.ones(BLOCK, BLOCK, device=device).to(FLOAT8), torch.ones(1, BLOCK, device=device)
    block_scale, matrix = torch.ones(1, 1, 1, device=device), torch.zeros(BLOCK, dtype=torch.int32, device=device)
    try:
        out = block_grouped_mm(values, scale, values[None], block_scale, matrix, torch.bfloat16)
        return None if float(out.mean()) == BLOCK else "sgl-deep-gemm multiplies wrongly here"
    except Exception as problem:  # built for another torch, no compiler, ...: whatever it is, it is said in the log
        return f"sgl-deep-gemm does not work here: {' '.join(str(problem).split())[:200]}"


def _matrix(expert_M: torch.Tensor, which: int) -> torch.Tensor:
    """The index of gate (0), up (1) or down (2) of each row's expert; -1 stays."""
    return torch.where(expert_M < 0, -1, 3 * expert_M + which).to(torch.int32)
