"""The requests of a cell, and which rank computes them: the same token ids for every strategy and for peers."""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence

import numpy as np

from moe_prefill.bench.cells import Cell
from moe_prefill.core import AtomicRequest, ModelSpec
from moe_prefill.costmodel import Batch, batch_flops

from .sides import Length, Side

MIXED = "mixed"


def lengths_of(options: argparse.Namespace, length: Length) -> Sequence[int]:
    """Tokens of a request, or of the several kinds of a mixed cell."""
    return options.mixed if isinstance(length, str) else [length]


def longest_of(options: argparse.Namespace, side: Side) -> int:
    return max(max(lengths_of(options, length)) for length in side.lengths)


def shares_of(side: Side) -> int:
    """Ranks' parts in one run: twice as many for a pipeline, which each run fills and drains."""
    return side.gpus * (2 if side.strategy == "pp+pp" else 1)


def counts_of(options: argparse.Namespace, side: Side, length: Length) -> list[tuple[int, int]]:
    """Tokens of a request, and how many such a run has. A mixed cell gives each length an equal part of the tokens."""
    kinds = lengths_of(options, length)
    return [(tokens, shares_of(side) * max(1, options.run_tokens // len(kinds) // tokens)) for tokens in kinds]


def requests_of(options: argparse.Namespace, side: Side, length: Length, vocab: int) -> list[AtomicRequest]:
    """Those of one run, in random order."""
    found: list[AtomicRequest] = []
    for tokens, count in counts_of(options, side, length):
        found += Cell(tail=tokens).requests(count, vocab)
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


def dealt(spec: ModelSpec, side: Side, requests: Sequence[AtomicRequest]) -> list[list[AtomicRequest]]:
    """What each rank is given: all of them, or a part, the costliest dealt first to whoever has least."""
    if not side.owns_requests:
        return [list(requests)] * side.gpus
    costs = {n: batch_flops(spec, Batch.uniform(n, n)) for n in {len(request.tokens) for request in requests}}
    ranks: list[list[AtomicRequest]] = [[] for _ in range(side.gpus)]
    loads = [(0, rank) for rank in range(side.gpus)]
    for request in sorted(requests, key=lambda request: -costs[len(request.tokens)]):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(request)
        heapq.heappush(loads, (load + costs[len(request.tokens)], rank))
    return ranks
