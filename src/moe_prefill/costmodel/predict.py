"""The predicted time of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import ModelSpec
from ..machine import MachineProfile
from .batch import Batch
from .flops import batch_flops
from .seconds import head_seconds, layer_seconds
from .streaming import RESIDENT, Streaming, bank_copies, exposure
from .work import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPrediction:
    """Seconds of one sweep.

    ``parts`` has the seconds of each part for every layer, ``head_s`` those of the LM head. ``exposed_s``: waiting for
    banks when sweeps follow one another, so that the first banks come during the end of the sweep before;
    ``exposed_first_s``: of the first sweep, which waits for its first bank in full. ``flops``: true FLOPs.
    """

    parts: tuple[dict[Part, float], ...]
    head_s: float
    exposed_s: float
    exposed_first_s: float
    flops: int

    @property
    def layer_s(self) -> tuple[float, ...]:
        return tuple(sum(parts.values()) for parts in self.parts)

    @property
    def compute_s(self) -> float:
        return sum(self.layer_s) + self.head_s

    @property
    def sweep_s(self) -> float:
        """Steady state: what a sweep among others takes."""
        return self.compute_s + self.exposed_s


def predict_sweep(
    spec: ModelSpec, batch: Batch, profile: MachineProfile, *, precision: str, streaming: Streaming = RESIDENT
) -> SweepPrediction:
    """Compute time of a batch on one rank and the waiting that streaming leaves exposed. UsageError: the profile lacks
    a rate.
    """
    assert len(streaming.levels) in (0, spec.num_layers), (streaming.levels, spec.num_layers)
    parts = tuple(layer_seconds(spec, index, batch, profile, precision) for index in range(spec.num_layers))
    head_s = head_seconds(spec, batch, profile, precision)
    copies = bank_copies(profile, streaming)
    waiting = exposure([sum(layer.values()) for layer in parts], head_s, copies, streaming.depth)
    return SweepPrediction(
        parts=parts,
        head_s=head_s,
        exposed_s=waiting.steady_s,
        exposed_first_s=waiting.first_s,
        flops=batch_flops(spec, batch),
    )
