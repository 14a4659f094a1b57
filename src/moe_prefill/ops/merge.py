"""Merging partial attentions over disjoint keys by log-sum-exp. T rows, H heads, d channels."""

from __future__ import annotations

import torch


def merge_(out_THd: torch.Tensor, lse_TH: torch.Tensor, other_THd: torch.Tensor, other_lse_TH: torch.Tensor) -> None:
    """Fold another partial result into (``out_THd``, ``lse_TH``), both float32, in place.

    A side without keys is (0, -inf) and leaves the other unchanged. Two sides of equal log-sum-exp average: out 1 and
    3 with lse 0 and 0 give out 2 and lse log 2.
    """
    assert out_THd.dtype == lse_TH.dtype == torch.float32, (out_THd.dtype, lse_TH.dtype)
    total = torch.logaddexp(lse_TH, other_lse_TH)
    # Where both sides are -inf the weights would be NaN; there the rows are zero anyway.
    base = torch.where(total == -torch.inf, 0.0, total)
    out_THd.mul_(torch.exp(lse_TH - base).unsqueeze(-1))
    out_THd.addcmul_(other_THd.float(), torch.exp(other_lse_TH - base).unsqueeze(-1))
    lse_TH.copy_(total)
