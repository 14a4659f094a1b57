"""The LM head, only for what is asked. A rows (asked positions), D channels, V vocabulary, P (row, id) pairs, K top-k.

Logits come out in float32. A bfloat16 product is accumulated and returned in float32 rather than rounded to bfloat16:
candidates that are close would tie otherwise.
"""

from __future__ import annotations

import torch

_UNIQUE_IDS_LIMIT = 4096  # more distinct candidates than this: one dot product a pair is cheaper than a dense block


def float32_mm(x_AD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` as float32 [A, V]."""
    if x_AD.dtype == torch.float32:
        return x_AD @ weight_VD.t()
    if x_AD.is_cuda:
        return torch.mm(x_AD, weight_VD.t(), out_dtype=torch.float32)
    return x_AD.float() @ weight_VD.float().t()


def candidate_logits(
    x_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    pair_row_P: torch.Tensor,
    pair_id_P: torch.Tensor,
    unique_ids_U: torch.Tensor,
    pair_unique_P: torch.Tensor,
) -> torch.Tensor:
    """Logits float32 [P] of pairs (row, id), reading only the candidates' rows of the head.

    ``unique_ids_U`` are the distinct ids and ``pair_unique_P`` each pair's index into them.
    """
    if len(unique_ids_U) <= _UNIQUE_IDS_LIMIT:
        dense = float32_mm(x_AD, weight_VD.index_select(0, unique_ids_U))
        return dense[pair_row_P, pair_unique_P]
    return _pair_logits(x_AD, weight_VD, pair_row_P, pair_id_P)


def _pair_logits(
    x_AD: torch.Tensor, weight_VD: torch.Tensor, pair_row_P: torch.Tensor, pair_id_P: torch.Tensor
) -> torch.Tensor:
    out = torch.empty(len(pair_id_P), dtype=torch.float32, device=x_AD.device)
    step = max(1, (1 << 26) // x_AD.shape[1])
    for low in range(0, len(out), step):
        part = slice(low, low + step)
        rows, heads = x_AD[pair_row_P[part]].float(), weight_VD[pair_id_P[part]].float()
        out[part] = (rows * heads).sum(-1)
    return out


def vocabulary_scores(
    x_AD: torch.Tensor,
    weight_VD: torch.Tensor,
    pair_row_P: torch.Tensor,
    pair_id_P: torch.Tensor,
    pair_bounds: list[int],
    *,
    rows_per_block: int,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Pair logits [P], log-partitions [A] and, with ``top_k``, ids int64 and logits [A, K] over the whole vocabulary.

    Works in blocks of ``rows_per_block`` rows, so [A, V] never exists at once. Pairs are sorted by row;
    ``pair_bounds[b]`` is the first pair of block b (host integers, one more than there are blocks).
    """
    logits_P = torch.empty(len(pair_id_P), dtype=torch.float32, device=x_AD.device)
    log_z_A = torch.empty(len(x_AD), dtype=torch.float32, device=x_AD.device)
    top: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block, low in enumerate(range(0, len(x_AD), rows_per_block)):
        dense = float32_mm(x_AD[low : low + rows_per_block], weight_VD)
        log_z_A[low : low + rows_per_block] = dense.logsumexp(-1)
        pairs = slice(pair_bounds[block], pair_bounds[block + 1])
        logits_P[pairs] = dense[pair_row_P[pairs] - low, pair_id_P[pairs]]
        if top_k:
            values, ids = dense.topk(top_k, dim=-1)
            top.append((ids, values))
    if not top:
        return logits_P, log_z_A, None, None
    return logits_P, log_z_A, torch.cat([ids for ids, _ in top]), torch.cat([values for _, values in top])
