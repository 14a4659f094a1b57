"""The predicted time of the baselines, which move activations instead of weights. N ranks, K top-k, D hidden.

What a rank computes is asked of the same functions as for asyncep, with the sizes of its part of the model; collectives
take the bytes that docs/communication.md derives, at the ``nccl`` bandwidth, and overlap nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..core import ModelSpec
from ..machine import MachineProfile
from .batch import Batch
from .flops import batch_flops, carried_rows
from .seconds import head_seconds, layer_seconds
from .work import ACTIVATION_BYTES, EXPERT_BYTES, layer_work

_LAYOUTS = 256  # ways to deal experts of unequal load to ranks, over which the busiest one is averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyPrediction:
    """Seconds of one sweep of all ranks, in the steady state: computing on the slowest one, and collectives.
    ``fill_s``: filling and draining a pipeline, once for all sweeps that follow one another. ``flops``: true ones of
    all ranks. ``tokens``: of all ranks' requests.
    """

    compute_s: float
    transfer_s: float
    fill_s: float
    flops: int
    tokens: int

    @property
    def sweep_s(self) -> float:
        return self.compute_s + self.transfer_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.sweep_s


def predict_strategy(
    spec: ModelSpec,
    name: str,
    ranks: int,
    batch: Batch,
    profile: MachineProfile,
    *,
    precision: str,
    skew: float = 1.0,
    micro_batches: int = 1,
) -> StrategyPrediction:
    """``name``: a baseline. ``batch``: a rank's own sweep under dp, all ranks' one under tp and pp. ``skew``: max/min
    load of the experts. ``micro_batches``: of equal requests, under pp. UsageError: the profile lacks a
    rate.
    """
    predict = _STRATEGIES[name]
    return predict(_Part(spec, ranks, batch, profile, precision, busiest_rank(spec, ranks, skew), micro_batches))


def busiest_rank(spec: ModelSpec, ranks: int, skew: float) -> float:
    """Pairs that reach the rank with most, over the mean, where each keeps 1/N of a layer's experts: loads fall
    geometrically over a ratio of ``skew`` and are dealt at random, so that every layer has another busiest rank.
    """
    if ranks == 1 or skew == 1.0 or not spec.num_experts:
        return 1.0
    loads = skew ** np.linspace(0.0, 1.0, spec.num_experts)
    dealt = np.random.default_rng(0).permuted(np.tile(loads, (_LAYOUTS, 1)), axis=1)
    edges = [rank * spec.num_experts // ranks for rank in range(ranks)]
    by_rank = np.add.reduceat(dealt, edges, axis=1)
    return float((by_rank.max(1) / by_rank.mean(1)).mean())


def ranks_a_row(spec: ModelSpec, ranks: int) -> float:
    """Ranks beside its own that a row goes to, when experts are chosen evenly."""
    experts, top_k = spec.num_experts, spec.top_k
    return (ranks - 1) * (1 - math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k))


@dataclass(frozen=True, slots=True)
class _Part:
    """What is asked, and the pieces that several strategies are made of."""

    spec: ModelSpec
    ranks: int
    batch: Batch
    profile: MachineProfile
    precision: str
    busiest: float
    micro_batches: int

    @property
    def element(self) -> int:
        return ACTIVATION_BYTES[self.precision]

    @property
    def row_bytes(self) -> int:
        """Of a row on its way to experts: float8 ones get it quantised, with its scale."""
        wide = EXPERT_BYTES[self.precision] == self.element
        return self.spec.hidden_size * self.element if wide else self.spec.hidden_size + 4

    def sum_layers(self, of_layer: Callable[[int], float]) -> float:
        return sum(of_layer(index) for index in range(self.spec.num_layers))

    def parts(self, spec: ModelSpec, index: int, batch: Batch | None = None) -> dict[str, float]:
        return dict(layer_seconds(spec, index, batch or self.batch, self.profile, self.precision).items())

    def rows(self, index: int) -> int:
        return carried_rows(self.spec, index, self.batch).num_rows

    def sparse(self, index: int) -> bool:
        return self.spec.layers[index].sparse

    def send_s(self, num_bytes: float) -> float:
        return num_bytes / self.profile.bandwidth("nccl") if self.ranks > 1 else 0.0

    def head_s(self) -> float:
        return head_seconds(self.spec, self.batch, self.profile, self.precision)

    def routed_s(self, spec: ModelSpec, index: int, batch: Batch) -> float:
        """What is elementwise for the chosen experts of a layer alone: its bytes grow evenly with their number."""
        chosen, other = spec.top_k, spec.top_k - 1 or 2
        some, others = (
            layer_work(replace(spec, top_k=top_k), index, batch, self.precision)["elementwise"].bytes
            for top_k in (chosen, other)
        )
        rows = min(batch.num_tokens, self.profile.chunk_rows)
        moved = chosen * (some - others) / (chosen - other)
        return moved / self.profile.rates("elementwise", self.precision).at(rows)

    def result(
        self, compute_s: float, transfer_s: float, *, sweeps: int = 1, fill_s: float = 0.0
    ) -> StrategyPrediction:
        return StrategyPrediction(
            compute_s=compute_s,
            transfer_s=transfer_s,
            fill_s=fill_s,
            flops=sweeps * batch_flops(self.spec, self.batch),
            tokens=sweeps * self.batch.num_tokens,
        )


def _dp_ep(part: _Part) -> StrategyPrediction:
    """Each step waits for the busiest rank. As many pairs as a rank sends out come in, to 1/N of the experts."""
    together = part.batch.times(part.ranks)

    def compute(index: int) -> float:
        seconds = part.parts(part.spec, index)
        if part.sparse(index):  # N ranks' rows meet at an expert, and the time of all of them is divided among ranks
            profile = replace(part.profile, choices={"chunk_rows": part.profile.chunk_rows * part.ranks})
            grouped = layer_seconds(part.spec, index, together, profile, part.precision)["experts"] / part.ranks
            routed_s = part.routed_s(part.spec, index, part.batch)
            seconds["experts"] = grouped * part.busiest
            seconds["elementwise"] += routed_s * (part.busiest - 1)
        return sum(seconds.values())

    def transfer(index: int) -> float:
        others = ranks_a_row(part.spec, part.ranks) * part.rows(index) if part.sparse(index) else 0.0
        there = part.row_bytes + 8 * part.spec.top_k
        return part.send_s(others * (there + part.spec.hidden_size * part.element) * part.busiest)

    return part.result(part.sum_layers(compute) + part.head_s(), part.sum_layers(transfer), sweeps=part.ranks)


def _dp_tp(part: _Part) -> StrategyPrediction:
    """All ranks' rows go through 1/N of every expert's channels."""
    narrow, together = replace(part.spec, expert_size=part.spec.expert_size // part.ranks), part.batch.times(part.ranks)

    def compute(index: int) -> float:
        seconds = part.parts(part.spec, index)
        if part.sparse(index):
            seconds["experts"] = part.parts(narrow, index, together)["experts"]
            seconds["elementwise"] -= part.routed_s(part.spec, index, part.batch)
            seconds["elementwise"] += part.routed_s(narrow, index, together)
        return sum(seconds.values())

    def transfer(index: int) -> float:
        rows = (part.ranks - 1) * part.rows(index) if part.sparse(index) else 0
        return part.send_s(rows * (part.row_bytes + 8 * part.spec.top_k + part.spec.hidden_size * part.element))

    return part.result(part.sum_layers(compute) + part.head_s(), part.sum_layers(transfer), sweeps=part.ranks)


def _tp(part: _Part, *, expert_parallel: bool) -> StrategyPrediction:
    """Every rank has all rows and 1/N of the heads and channels, or whole experts; two all-reduces a layer."""
    spec, n = part.spec, part.ranks
    cut = replace(
        spec,
        num_heads=spec.num_heads // n,
        num_kv_heads=max(1, spec.num_kv_heads // n),
        dense_size=spec.dense_size // n,
        shared_size=spec.shared_size // n,
        expert_size=spec.expert_size if expert_parallel else spec.expert_size // n,
    )

    def compute(index: int) -> float:
        seconds = part.parts(cut, index)
        if expert_parallel and part.sparse(index):
            routed_s = part.routed_s(cut, index, part.batch)
            seconds["experts"] *= part.busiest / n
            seconds["elementwise"] += routed_s * (part.busiest / n - 1)
        return sum(seconds.values())

    def transfer(index: int) -> float:
        return part.send_s(4 * (n - 1) / n * part.rows(index) * spec.hidden_size * part.element)

    return part.result(part.sum_layers(compute) + part.head_s(), part.sum_layers(transfer))


def _pp(part: _Part) -> StrategyPrediction:
    """Micro-batches follow one another; the slowest stage is always busy, and sends beside its computing. No request
    is cut.
    """
    rows = part.batch.rows
    length = int((rows.first + rows.length).max())
    tokens = max(part.batch.num_tokens // part.micro_batches, length)
    count = part.batch.num_tokens / tokens
    micro = Batch.uniform(tokens, length, prune_last=part.batch.carried is not rows)
    layers = part.spec.num_layers
    edges = [rank * layers // part.ranks for rank in range(part.ranks + 1)]
    layer_s = [sum(part.parts(part.spec, index, micro).values()) for index in range(layers)]
    stages = [sum(layer_s[a:b]) for a, b in itertools.pairwise(edges)]
    stages[-1] += part.head_s() / count
    return part.result(count * max(stages), 0.0, fill_s=(part.ranks - 1) * max(stages))


_STRATEGIES: dict[str, Callable[[_Part], StrategyPrediction]] = {
    "dp+ep": _dp_ep,
    "dp+tp": _dp_tp,
    "tp+ep": lambda part: _tp(part, expert_parallel=True),
    "tp+tp": lambda part: _tp(part, expert_parallel=False),
    "pp+pp": _pp,
}
