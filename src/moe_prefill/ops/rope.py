"""Rotary position embedding, after an optional norm over each head. T tokens, H heads, d head channels, r rotated
channels.
"""

from __future__ import annotations

import torch

from .backend import use_triton
from .rms_norm import few_passes_rms_norm
from .script import scripted


def rope_tables(
    positions_T: torch.Tensor, inv_freq: torch.Tensor, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, r / 2] in ``dtype``, computed in float32 and scaled by ``factor``.

    ``inv_freq`` float32 is [r / 2], or [T, r / 2] where frequencies depend on the request.
    """
    angles = positions_T.float()[:, None] * inv_freq
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def ref_apply_rope(x_THd: torch.Tensor, cos_Tr: torch.Tensor, sin_Tr: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs (i, i + r / 2): ``x1 cos - x2 sin`` and ``x2 cos + x1 sin``; channels past r pass unchanged.

    One token, one head of two channels [1, 0], a quarter turn (cos 0, sin 1) gives [0, 1].
    """
    half = cos_Tr.shape[-1]
    cos, sin = cos_Tr[:, None, :], sin_Tr[:, None, :]
    first, second, rest = x_THd[..., :half], x_THd[..., half : 2 * half], x_THd[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def head_norm_rope(
    x_THd: torch.Tensor,
    weight_d: torch.Tensor | None,
    cos_Tr: torch.Tensor,
    sin_Tr: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the channels of each head where ``weight_d`` is given, then the rotation; contiguous [T, H, d], or
    ``out``, which may be ``x_THd`` itself.
    """
    assert len(x_THd) == len(cos_Tr) == len(sin_Tr), (x_THd.shape, cos_Tr.shape)
    if use_triton(x_THd) and 2 * cos_Tr.shape[-1] == x_THd.shape[-1]:
        from .kernels.rope import head_norm_rope_kernel

        return head_norm_rope_kernel(x_THd, weight_d, cos_Tr, sin_Tr, eps, out)
    normed_rope = _cpu_head_norm_rope if x_THd.device.type == "cpu" else _head_norm_rope
    rotated = normed_rope(x_THd, weight_d, cos_Tr, sin_Tr, eps)
    return rotated if out is None else out.copy_(rotated)


def _head_norm_rope(
    x_THd: torch.Tensor, weight_d: torch.Tensor | None, cos_Tr: torch.Tensor, sin_Tr: torch.Tensor, eps: float
) -> torch.Tensor:
    """The references without their temporaries: each half is written where it belongs."""
    if weight_d is not None:
        x_THd = few_passes_rms_norm(x_THd, weight_d, eps)
    half = cos_Tr.shape[-1]
    cos, sin = cos_Tr[:, None, :], sin_Tr[:, None, :]
    first, second = x_THd[..., :half], x_THd[..., half : 2 * half]
    out = torch.empty(x_THd.shape, dtype=x_THd.dtype, device=x_THd.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = x_THd[..., 2 * half :]
    return out


_cpu_head_norm_rope = scripted(_head_norm_rope)
