"""Predicted seconds where sweeps differ: ranks that work by themselves, in step, or one behind the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_prefill.core import AtomicRequest, ModelSpec
from moe_prefill.costmodel import Batch, Streaming, head_seconds, layer_seconds, predict_strategy, predict_sweep
from moe_prefill.forming import Forming
from moe_prefill.machine import MachineProfile

from .sides import Side


def batch_of(requests: Sequence[AtomicRequest], forming: Forming, vocab: int, *, prune_last: bool = True) -> Batch:
    """One sweep, or one micro-batch."""
    batch = Batch.from_requests(requests, forming.salts(requests), forming.rule, vocab)
    return batch if prune_last else Batch(batch.rows, batch.rows, batch.asked_rows, batch.head_rows)


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Seconds of what the ranks of a side are given. ``streaming``: of asyncep's banks."""

    side: Side
    spec: ModelSpec
    profile: MachineProfile
    precision: str
    streaming: Streaming | None = None

    def seconds(self, ranks: Sequence[Sequence[Batch | None]]) -> float:
        """From the begin of the first sweep to the end of the last. ``ranks``: the sweeps of each in order, None for a
        round without; under tp and pp the same for each. Ranks in step take as long as the longest sweep of a round.
        """
        if self.streaming is not None and not self._rounds:
            return max(sum(map(self._sweep_s, filter(None, own))) for own in ranks)
        if not self.side.owns_requests:
            only = [batch for batch in ranks[0] if batch is not None]
            return self._pipeline_s(only) if self.side.strategy == "pp+pp" else sum(map(self._sweep_s, only))
        return sum(max(map(self._sweep_s, filter(None, given))) for given in itertools.zip_longest(*ranks))

    @property
    def _rounds(self) -> bool:
        """Whether ranks stage banks for one another, or gather them together."""
        assert self.streaming is not None
        return self.streaming.peer == "nccl" or "hybrid" in self.streaming.levels

    def _pipeline_s(self, micro_batches: Iterable[Batch]) -> float:
        """Each micro-batch begins at a stage when the stage before it and the micro-batch before it are done; sending
        is hidden.
        """
        ranks, layers = self.side.gpus, self.spec.num_layers
        edges = [rank * layers // ranks for rank in range(ranks + 1)]
        free_s = [0.0] * ranks
        for batch in micro_batches:
            layer_s, ready_s = self._layers(batch), 0.0
            for rank, (first, last) in enumerate(itertools.pairwise(edges)):
                stage_s = sum(layer_s[first:last])
                if rank == ranks - 1:
                    stage_s += head_seconds(self.spec, batch, self.profile, self.precision)
                ready_s = free_s[rank] = max(ready_s, free_s[rank]) + stage_s
        return free_s[-1]

    def _sweep_s(self, batch: Batch) -> float:
        if self.streaming is not None:
            return predict_sweep(
                self.spec, batch, self.profile, precision=self.precision, streaming=self.streaming
            ).sweep_s
        side = self.side
        return predict_strategy(
            self.spec, side.strategy, side.gpus, batch, self.profile, precision=self.precision, skew=side.skew
        ).sweep_s

    def _layers(self, batch: Batch) -> list[float]:
        """Seconds of every layer; equal ones are computed once."""
        last, known, found = self.spec.num_layers - 1, dict[tuple[object, bool], float](), list[float]()
        for index, layer in enumerate(self.spec.layers):
            key = (layer, index == last)
            if key not in known:
                known[key] = sum(layer_seconds(self.spec, index, batch, self.profile, self.precision).values())
            found.append(known[key])
        return found
