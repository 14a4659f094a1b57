"""Where an op runs: Triton kernels on CUDA, plain torch elsewhere. ``MOE_PREFILL_OPS=torch`` forces the plain
versions.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def triton_enabled() -> bool:
    """Triton is installed and not switched off by the environment."""
    return os.environ.get("MOE_PREFILL_OPS", "") != "torch" and importlib.util.find_spec("triton") is not None


def use_triton(x: torch.Tensor) -> bool:
    """Rows on a GPU go through Triton; an optional dependency that is missing costs speed, never correctness."""
    return x.is_cuda and triton_enabled()
