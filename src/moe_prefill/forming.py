"""Which requests go into which sweep. A pure function of the list, so that the same list gives the same sweeps,
whoever computes them. Torch-free: the controller of several workers forms the sweeps that an engine alone would form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .config import Sharing
from .core import AtomicRequest, EngineLimits, ModelSpec
from .errors import RowError
from .forest import SHARE_EVERYTHING, SHARE_NOTHING, SharingRule, common_prefixes, shared_tokens, sort_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Forming:
    """What an engine accepts, and how it cuts a list of requests into sweeps.

    ``private_beyond``: requests of more tokens share with nobody (under dynamic rope they have their own frequencies).
    """

    limits: EngineLimits
    rule: SharingRule
    private_beyond: int | None = None

    def refusal(self, request: AtomicRequest) -> RowError | None:
        """Why a request cannot be computed at all, or None."""
        limits = self.limits
        if len(request.tokens) > limits.max_request_tokens:
            return RowError(
                "too_long",
                f"the request has {len(request.tokens)} tokens; the limit is {limits.max_request_tokens} "
                "(the smaller of the model's context and the memory plan); shorten it or use --truncate",
            )
        for name, ids in (("token", request.tokens), ("candidate", request.ids)):
            if len(ids) and (ids.min() < 0 or ids.max() >= limits.vocab_size):
                worst = int(ids.min() if ids.min() < 0 else ids.max())
                return RowError(
                    "bad_token", f"{name} id {worst} is outside the vocabulary of {limits.vocab_size} tokens"
                )
        if request.top_k > limits.vocab_size:
            return RowError("bad_top_k", f"top_k is {request.top_k}; the vocabulary has {limits.vocab_size} tokens")
        return None

    def salts(self, requests: Sequence[AtomicRequest]) -> list[str]:
        """The salt under which each request shares; those of private requests sort as the requests do."""
        longest = self.private_beyond
        return [
            f"{request.salt}\0{index:012d}" if longest is not None and len(request.tokens) > longest else request.salt
            for index, request in enumerate(requests)
        ]

    def sweeps(self, requests: Sequence[AtomicRequest], valid: Sequence[int]) -> Iterator[list[int]]:
        """Indices of the requests of each sweep, out of ``valid``; a sweep's packed forest fits the limits."""
        if not valid:
            return
        subset = [requests[index] for index in valid]
        salts = self.salts(subset)
        todo = form_sweeps(subset, salts, self.limits.max_sweep_tokens, sharing=self.rule.share)
        todo.reverse()
        while todo:
            sweep = todo.pop()
            if len(sweep) > 1 and self._tokens(subset, salts, sweep) > self.limits.max_sweep_tokens:
                middle = len(sweep) // 2
                todo += [sweep[middle:], sweep[:middle]]
                continue
            yield [valid[index] for index in sweep]

    def _tokens(self, requests: list[AtomicRequest], salts: list[str], sweep: list[int]) -> int:
        """Tokens of the sweep's forest: the rule may share less than everything that could be shared."""
        return shared_tokens([requests[index].tokens for index in sweep], self.rule, [salts[index] for index in sweep])


def form_sweeps(
    requests: Sequence[AtomicRequest], salts: Sequence[str], max_tokens: int, *, sharing: bool
) -> list[list[int]]:
    """Indices of the requests of each sweep.

    Sorted, so that what shares a prefix is together; cut into sweeps of near-equal size by the tokens that each
    request adds when everything is shared.
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


def sharing_rule(spec: ModelSpec, sharing: Sharing) -> SharingRule:
    """When sharing pays, from the shapes, in units of one token's linear work in one layer.

    A merge reads and writes a few rows of H d channels in float32 and runs at the speed of memory, the linear work at
    that of the matrix units: about 250 FLOPs a byte on Hopper GPUs (BF16 datasheet). A gathered key is one read
    and one write of K and V.
    """
    if sharing == "off":
        return SHARE_NOTHING
    if sharing == "force":
        return SHARE_EVERYTHING
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    width = spec.top_k * spec.expert_size + spec.shared_size if spec.num_sparse_layers else spec.dense_size
    linear = 2 * spec.hidden_size * (2 * q_width + 2 * kv_width) + 6 * spec.hidden_size * width
    flops_per_byte = 250
    return SharingRule(
        min_saved=64,
        merge_cost=16 * q_width * flops_per_byte / linear,
        gather_cost=8 * kv_width * flops_per_byte / linear,
    )
