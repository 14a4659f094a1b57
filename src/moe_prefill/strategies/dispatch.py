"""Which rows of a chunk go to which rank, and how they find home: arithmetic on tensors, no communication.

Letters: T tokens of a chunk, K top-k, N ranks, S rows sent (a token counts once for every rank that has one of its
experts), E experts of the model, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Destinations:
    """``needed`` bool [N, T]: rank n has experts of token t. ``counts`` int64 [N, 2]: its rows and its (token, expert)
    pairs. ``owner`` int64 [T, K]: the rank of each expert.
    """

    needed: torch.Tensor
    counts: torch.Tensor
    owner: torch.Tensor


def destinations(ids_TK: torch.Tensor, starts_N: torch.Tensor) -> Destinations:
    """``starts_N`` int64, ascending from 0: the first expert of every rank.

    Two tokens, experts [0, 1] and [1, 3], two ranks that start at 0 and 2: rank 0 gets both tokens and three pairs,
    rank 1 the second token and one pair.
    """
    owner = torch.searchsorted(starts_N, ids_TK, right=True) - 1
    at = owner[None] == torch.arange(len(starts_N), device=ids_TK.device)[:, None, None]
    needed = at.any(-1)
    return Destinations(needed, torch.stack([needed.sum(1), at.sum((1, 2))], dim=1), owner)


def send_order(to: Destinations, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank and token of every sent row, int64 [S] each, sorted by rank, then token; ``num_rows`` is S."""
    order = torch.sort(to.needed.flatten().to(torch.uint8), descending=True, stable=True).indices[:num_rows]
    tokens = max(1, to.needed.shape[1])
    return order // tokens, order % tokens


def homes(to: Destinations) -> torch.Tensor:
    """Where the answers to a token arrive: row of the N slots of each token, int64 [T, N]; 0 where nothing was sent."""
    flat = to.needed.flatten()
    rows = torch.where(flat, torch.cumsum(flat, 0) - 1, 0)
    return rows.view(to.needed.shape).t()


def pack_choices(weights_SK: torch.Tensor, ids_SK: torch.Tensor, scale_S: torch.Tensor | None = None) -> torch.Tensor:
    """What travels beside a row: weights (float32), ids (int32), the scale of a float8 row; int32 [S, 2K (+ 1)]."""
    parts = [weights_SK.float().view(torch.int32), ids_SK.int()]
    return torch.cat(parts if scale_S is None else [*parts, scale_S.view(torch.int32)[:, None]], dim=1)


def unpack_choices(packed: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weights float32 and ids int64 [S, K], and scales float32 [S] or None."""
    weights = packed[:, :top_k].contiguous().view(torch.float32)
    scale = packed[:, 2 * top_k :].contiguous().view(torch.float32)
    return weights, packed[:, top_k : 2 * top_k].long(), scale[:, 0] if scale.shape[1] else None


def grouped_sources(rows: Sequence[int], pairs: Sequence[int], most_pairs: int) -> list[tuple[slice, int]]:
    """Received rows in groups of whole sources with at most ``most_pairs`` pairs together, or of one source: slices of
    the rows, and the pairs of each.

    Balanced ranks are computed in one group; a rank that everybody sends to stays within its memory.
    """
    groups: list[tuple[slice, int]] = []
    begin = end = total = 0
    for count, weight in zip(rows, pairs, strict=True):
        if total and total + weight > most_pairs:
            groups.append((slice(begin, end), total))
            begin, total = end, 0
        end, total = end + count, total + weight
    return [*groups, (slice(begin, end), total)] if end > begin else groups
