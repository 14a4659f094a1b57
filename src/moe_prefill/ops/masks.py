"""Which keys a query sees."""

from __future__ import annotations

import torch


def visible(
    num_queries: int, num_keys: int, *, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Boolean [queries, keys] of what may be seen, aligned at the end; None where everything may."""
    if not causal:
        return None
    row = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    column = torch.arange(num_keys, device=device)[None, :]
    mask = column <= row
    return mask if window is None else mask & (column > row - window)
