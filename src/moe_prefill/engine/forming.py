"""Which requests go into which sweep. A pure function of the list, so that the same list gives the same sweeps.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core import AtomicRequest, EngineLimits
from ..errors import RowError
from ..forest import common_prefixes, sort_requests


def refusal(request: AtomicRequest, limits: EngineLimits) -> RowError | None:
    """Why a request cannot be computed at all, or None."""
    if len(request.tokens) > limits.max_request_tokens:
        return RowError(
            "too_long",
            f"the request has {len(request.tokens)} tokens; the limit is {limits.max_request_tokens} "
            "(the smaller of the model's context and the memory plan); shorten it or use --truncate",
        )
    for name, ids in (("token", request.tokens), ("candidate", request.ids)):
        if len(ids) and (ids.min() < 0 or ids.max() >= limits.vocab_size):
            worst = int(ids.min() if ids.min() < 0 else ids.max())
            return RowError("bad_token", f"{name} id {worst} is outside the vocabulary of {limits.vocab_size} tokens")
    if request.top_k > limits.vocab_size:
        return RowError("bad_top_k", f"top_k is {request.top_k}; the vocabulary has {limits.vocab_size} tokens")
    return None


def form_sweeps(
    requests: Sequence[AtomicRequest], salts: Sequence[str], max_tokens: int, *, sharing: bool
) -> list[list[int]]:
    """Indices of the requests of each sweep.

    Sorted, so that what shares a prefix is together; cut into sweeps of near-equal size by the tokens that each
    request adds when everything is shared. A sweep whose real forest turns out larger than ``max_tokens`` is halved
    by the caller.
    """
    sequences = [request.tokens for request in requests]
    order = sort_requests(sequences, salts)
    shared = common_prefixes(sequences, order, salts) if sharing else [0] * len(order)
    added = np.asarray([len(sequences[index]) for index in order]) - np.asarray(shared)
    total = int(added.sum())
    target = total / -(-total // max_tokens)
    sweeps: list[list[int]] = []
    filled, tokens = 0.0, 0
    for index, new in zip(order, added.tolist(), strict=True):
        # The first request of a sweep brings its whole prefix along.
        if not sweeps or tokens + new > max_tokens or filled + new / 2 > target * len(sweeps):
            sweeps.append([])
            tokens, new_tokens = 0, len(sequences[index])
        else:
            new_tokens = new
        sweeps[-1].append(index)
        tokens += new_tokens
        filled += new
    return sweeps
