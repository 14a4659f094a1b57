"""Merging partial attentions over disjoint keys by log-sum-exp. T rows, H heads, d channels."""

from __future__ import annotations

import torch

from .backend import use_triton


def ref_merge_(
    out_THd: torch.Tensor, lse_TH: torch.Tensor, other_THd: torch.Tensor, other_lse_TH: torch.Tensor
) -> None:
    """Fold another partial result into (``out_THd``, ``lse_TH``) in place, in float32; ``out_THd`` is rounded to its
    dtype once. Where more than two are merged it should be float32.

    A side without keys is (0, -inf) and leaves the other unchanged. Two sides of equal log-sum-exp average: out 1 and
    3 with lse 0 and 0 give out 2 and lse log 2.
    """
    total = torch.logaddexp(lse_TH, other_lse_TH)
    # Where both sides are -inf the weights would be NaN; there the rows are zero anyway.
    base = torch.where(total == -torch.inf, 0.0, total)
    wide = out_THd if out_THd.dtype == torch.float32 else out_THd.float()
    wide.mul_(torch.exp(lse_TH - base).unsqueeze(-1))
    wide.addcmul_(other_THd.float(), torch.exp(other_lse_TH - base).unsqueeze(-1))
    if wide is not out_THd:
        out_THd.copy_(wide)
    lse_TH.copy_(total)


def merge_(out_THd: torch.Tensor, lse_TH: torch.Tensor, other_THd: torch.Tensor, other_lse_TH: torch.Tensor) -> None:
    """``ref_merge_``, in one pass on a GPU; log-sum-exps are float32."""
    assert out_THd.shape == other_THd.shape, (out_THd.shape, other_THd.shape)
    assert lse_TH.dtype == other_lse_TH.dtype == torch.float32, (lse_TH.dtype, other_lse_TH.dtype)
    if use_triton(out_THd):
        from .kernels.merge import merge_kernel_

        merge_kernel_(out_THd, lse_TH, other_THd, other_lse_TH)
    elif out_THd.is_cuda:
        ref_merge_(out_THd, lse_TH, other_THd, other_lse_TH)
    else:
        # A CPU saves the rows between descendants of one ancestor and the next, which have nothing to merge.
        rows = (other_lse_TH != -torch.inf).any(1).nonzero().squeeze(1)
        out, lse = out_THd[rows], lse_TH[rows]
        ref_merge_(out, lse, other_THd[rows], other_lse_TH[rows])
        out_THd[rows], lse_TH[rows] = out, lse
