"""What each row's expert makes of its token, in the weights' own precision, and which kernels compute it. T tokens, E
experts, D channels, I expert channels, R rows in the order of ``permute``.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import choice
from .grouped import grouped_mm
from .permute import ExpertOrder, permute
from .script import scripted
from .swiglu import swiglu

VARIABLE = "MOE_PREFILL_EXPERTS"
_TILE = (128, 192)  # rows x channels; two groups of warps take turns


@dataclass(frozen=True, slots=True)
class ExpertKernel:
    """``run(x, order, gate_up, down)`` gives [R, D]. ``refusal(device)`` says why it cannot run there, or None."""

    name: str
    run: Callable[[torch.Tensor, ExpertOrder, torch.Tensor, torch.Tensor], torch.Tensor]
    refusal: Callable[[torch.device], str | None]


def expert_rows(
    x_TD: torch.Tensor, order: ExpertOrder, gate_up_E2ID: torch.Tensor, down_EDI: torch.Tensor
) -> torch.Tensor:
    """``down(swiglu(gate_up(x)))`` of every row by its expert; [R, D]. No host synchronisation on CUDA."""
    if not x_TD.is_cuda:
        return _cpu_rows(x_TD, order.token_of_row_R, order.ends_E, gate_up_E2ID, down_EDI)
    if not _suits_hopper(x_TD, down_EDI):
        return _torch_rows(x_TD, order, gate_up_E2ID, down_EDI)
    return chosen(x_TD.device).run(x_TD, order, gate_up_E2ID, down_EDI)


@functools.cache
def chosen(device: torch.device) -> ExpertKernel:
    """The kernel for bfloat16 experts there; see ``choice.choose``."""
    return choice.choose(KERNELS, lambda kernel: kernel.refusal(device), VARIABLE)


def explain(device: torch.device) -> list[str]:
    """A line for each kernel: chosen, possible, or why not."""
    return choice.explain(KERNELS, lambda kernel: kernel.refusal(device), VARIABLE)


def _suits_hopper(x_TD: torch.Tensor, down_EDI: torch.Tensor) -> bool:
    """The dtype, and rows of 16 bytes for the loads."""
    return x_TD.dtype == torch.bfloat16 and all(size % 8 == 0 for size in down_EDI.shape[1:])


def _torch_rows(
    x_TD: torch.Tensor, order: ExpertOrder, gate_up_E2ID: torch.Tensor, down_EDI: torch.Tensor
) -> torch.Tensor:
    hidden_RI = swiglu(grouped_mm(permute(x_TD, order), gate_up_E2ID, order.ends_E))
    return grouped_mm(hidden_RI, down_EDI, order.ends_E)


@scripted
def _cpu_rows(
    x_TD: torch.Tensor,
    token_of_row_R: torch.Tensor,
    ends_E: torch.Tensor,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
) -> torch.Tensor:
    """An expert at a time from its tokens to its rows: what lies between stays in the cache.

    In bfloat16 an expert's rows are rounded up to a multiple of 32 where there are so many; those too many are the next
    experts', which write them after it. So products come in few shapes: the CPU's bfloat16 product is compiled for
    each, which costs more than the product itself.
    """
    num_rows, step = len(token_of_row_R), 32 if x_TD.dtype == torch.bfloat16 else 1
    out_RD = torch.empty([num_rows, down_EDI.shape[1]], dtype=x_TD.dtype)
    begin = 0
    ends: list[int] = ends_E.long().tolist()
    for expert in range(len(ends)):
        end = ends[expert]
        if end > begin:
            last = begin + (end - begin + step - 1) // step * step
            last = last if last <= num_rows else end
            rows = x_TD.index_select(0, token_of_row_R[begin:last])
            gate, up = torch.mm(rows, gate_up_E2ID[expert].t()).chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), down_EDI[expert].t(), out=out_RD[begin:last])
        begin = end
    return out_RD


def _quack_rows(
    x_TD: torch.Tensor, order: ExpertOrder, gate_up_E2ID: torch.Tensor, down_EDI: torch.Tensor
) -> torch.Tensor:
    """The first product's loads gather the rows, and its epilogue is the gated activation on float32 sums."""
    from quack.gemm import gemm
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_act

    num_rows, (_, D, I) = len(order.token_of_row_R), down_EDI.shape
    starts_E1 = F.pad(order.ends_E, (1, 0))
    hidden_RI, out_RD = x_TD.new_empty(num_rows, I), x_TD.new_empty(num_rows, D)
    gemm_act(
        x_TD,
        gate_up_E2ID.mT,
        activation="swiglu",
        postact_out=hidden_RI,
        store_preact=False,
        cu_seqlens_m=starts_E1,
        A_idx=order.token_of_row_R,
        concat_layout=("B",),
        tuned=False,
        config=GemmConfig(*_TILE, pingpong=True, is_dynamic_persistent=False),
    )
    gemm(hidden_RI, down_EDI, out_RD, None, None, *_TILE, 2, 1, pingpong=True, cu_seqlens_m=starts_E1)
    return out_RD


def _quack_refusal(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU"
    if importlib.util.find_spec("quack") is None:
        return "not installed (pip install quack-kernels)"
    return None


KERNELS = (
    ExpertKernel("quack", _quack_rows, _quack_refusal),
    ExpertKernel("torch", _torch_rows, lambda device: None),
)
