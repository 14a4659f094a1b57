"""Routing: which experts a token goes to, with what weights. T tokens, D channels, E experts, K top-k."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import use_triton


def route(
    x_TD: torch.Tensor, router_ED: torch.Tensor, top_k: int, *, normalize: bool, float32_weights: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] and expert ids int64 [T, K], best first.

    Logits in the model's dtype, softmax in float32, as the reference implementations have it. ``normalize`` makes the
    K weights sum to one. They are returned in float32 when ``float32_weights``, else rounded to the dtype of
    ``x_TD``.
    """
    dtype = torch.float32 if float32_weights else x_TD.dtype
    return top_k_weights(F.linear(x_TD, router_ED), top_k, normalize=normalize, dtype=dtype)


def ref_top_k_weights(
    logits_TE: torch.Tensor, top_k: int, *, normalize: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest softmax scores and their ids; of equal scores the lower id first.

    A row with a NaN or an infinite logit has NaN weights, and ids that are distinct and in range all the same.
    """
    scores = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights, ids = (part[:, :top_k] for part in torch.sort(scores, dim=-1, descending=True, stable=True))
    return _rounded(weights, normalize, dtype), ids


def top_k_weights(
    logits_TE: torch.Tensor, top_k: int, *, normalize: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ref_top_k_weights``; on a CPU which of equal scores comes first is up to ``torch.topk``."""
    assert 1 <= top_k <= logits_TE.shape[1], (top_k, logits_TE.shape)
    if use_triton(logits_TE):
        from .kernels.router import top_k_kernel

        return top_k_kernel(logits_TE, top_k, normalize=normalize, dtype=dtype)
    weights, ids = torch.topk(torch.softmax(logits_TE, dim=-1, dtype=torch.float32), top_k, dim=-1)
    return _rounded(weights, normalize, dtype), ids


def _rounded(weights_TK: torch.Tensor, normalize: bool, dtype: torch.dtype) -> torch.Tensor:
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK.to(dtype)
