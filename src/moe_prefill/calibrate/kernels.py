"""Which kernels a model's layers run with on this machine, and why the others do not."""

from __future__ import annotations

import torch

from .. import ops
from ..core import ModelSpec
from ..ops.flash import is_legal


def attention_kernels(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A line for each kernel: chosen, possible, or why not; once for layers with a sliding window and once for others
    where the model has both.
    """
    if not is_legal(torch.empty(0, spec.num_heads, spec.head_dim, dtype=dtype, device=device)):
        stated = f"{str(dtype).removeprefix('torch.')}, heads of {spec.head_dim}, {device.type}"
        return [f"plain torch: chosen; flash kernels need a GPU, 16-bit numbers and heads of 8 to 256 ({stated})"]
    kinds = sorted({layer.window is not None for layer in spec.layers})
    return [
        f"{line}{' (sliding windows)' if windowed else ''}"
        for windowed in kinds
        for line in ops.explain_flash(device, windowed=windowed)
    ]


def expert_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The same for the experts, in the weights' own precision."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return ["plain grouped products: chosen; other kernels need a GPU and bfloat16"]
    return ops.explain_experts(device)
