"""Seconds of one sweep, as ``costmodel.predict_sweep`` gives them, with equal layers computed once."""

from __future__ import annotations

from dataclasses import dataclass

from ..costmodel import Batch, bank_copies, batch_flops, exposure, head_seconds, layer_seconds
from ..frontend import Machine


@dataclass(frozen=True, slots=True)
class SweepTime:
    """``compute_s``, and what is waited for banks: ``exposed_s`` among other sweeps, ``exposed_first_s`` at first."""

    compute_s: float
    exposed_s: float
    exposed_first_s: float
    flops: int


class SweepTimer:
    """The time of sweeps on one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        spec = machine.spec
        self._copies = bank_copies(machine.profile, machine.streaming)
        last = spec.num_layers - 1
        first_of: dict[object, int] = {}
        # The first layer norms the embeddings too, the last one carries fewer rows.
        self._like = [first_of.setdefault((layer, i == 0, i == last), i) for i, layer in enumerate(spec.layers)]

    def time(self, batch: Batch) -> SweepTime:
        machine, seconds = self.machine, dict[int, float]()
        for index in set(self._like):
            parts = layer_seconds(machine.spec, index, batch, machine.profile, machine.precision)
            seconds[index] = sum(parts.values())
        layer_s = [seconds[index] for index in self._like]
        head_s = head_seconds(machine.spec, batch, machine.profile, machine.precision)
        waiting = exposure(layer_s, head_s, self._copies, machine.streaming.depth)
        flops = batch_flops(machine.spec, batch)
        return SweepTime(sum(layer_s) + head_s, waiting.steady_s, waiting.first_s, flops)
