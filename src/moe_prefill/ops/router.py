"""Routing: which experts a token goes to, with what weights. T tokens, D channels, E experts, K top-k."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def route(
    x_TD: torch.Tensor, router_ED: torch.Tensor, top_k: int, *, normalize: bool, float32_weights: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] and expert ids int64 [T, K], best first.

    Logits in the model's dtype, softmax in float32, as the reference implementations have it. ``normalize`` makes the
    K weights sum to one. They are returned in float32 when ``float32_weights``, else rounded to the dtype of
    ``x_TD``.
    """
    scores = torch.softmax(F.linear(x_TD, router_ED), dim=-1, dtype=torch.float32)
    weights, ids = torch.topk(scores, top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights if float32_weights else weights.to(x_TD.dtype)), ids
