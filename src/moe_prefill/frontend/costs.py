"""What one request adds to a worker, given what it finds there: integer FLOPs, and predicted nanoseconds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from ..core import ModelSpec
from ..costmodel import Batch, LayerFlops, layer_flops, predict_sweep
from ..forest import SharingRule
from ..machine import MachineProfile
from .ticket import Ticket

_USUAL_TOKENS = 512  # of the requests by which the time of a token is predicted
_STEPS = 4  # of the table of attention rates, an octave


class Cost(NamedTuple):
    """``flops``: true FLOPs over all layers and the head. ``ns``: predicted time in a full sweep."""

    flops: int
    ns: int


@dataclass(frozen=True, slots=True)
class _Window:
    """Layers (all but the last) of one attention window: how many FLOPs a (query, key) pair costs over them."""

    window: int | None
    pair_flops: int

    def pairs(self, rows: int) -> int:
        """Pairs of the first ``rows`` positions."""
        if self.window is None or rows <= self.window:
            return rows * (rows + 1) // 2
        return self.window * (self.window + 1) // 2 + (rows - self.window) * self.window


class RequestCosts:
    """The cost model for single requests in closed form: tokens from ``begin`` on, attending to all before them.

    Equal to ``costmodel.batch_flops`` of that request alone when its asked positions are consecutive, so in a sweep
    whose sharing was foreseen the bookings add up to the sweep. Time: that of a token in a full sweep of short
    requests, attention at the rate of its own length.
    """

    def __init__(
        self, spec: ModelSpec, profile: MachineProfile, *, precision: str, sweep_tokens: int, rule: SharingRule
    ) -> None:
        self.rule = rule
        layers = [layer_flops(spec, index) for index in range(spec.num_layers)]
        self._row = sum(layer.row for layer in layers[:-1]) + layers[-1].keys_values
        self._asked_row = layers[-1].row - layers[-1].keys_values
        self._head_row = 2 * spec.hidden_size
        self._windows = _windows(spec, layers[:-1])
        self._last = _Window(spec.layers[-1].window, layers[-1].attention_pair)
        batch = Batch.uniform(sweep_tokens, min(_USUAL_TOKENS, sweep_tokens))
        sweep = predict_sweep(spec, batch, profile, precision=precision)
        attention_s = sum(parts["attention"] for parts in sweep.parts)
        self._ns_per_token = (sweep.compute_s - attention_s) * 1e9 / sweep_tokens
        rates = profile.rates("attention", precision)
        longest = math.ceil(math.log2(2 * spec.max_positions)) * _STEPS
        self._attention_ns = [1e9 / rates.at(2.0 ** (step / _STEPS)) for step in range(longest + 1)]  # of a FLOP

    def of(self, ticket: Ticket, begin: int) -> Cost:
        """The cost of all but the first ``begin`` tokens."""
        return self.range(begin, ticket.num_tokens, ticket.first_asked, ticket.asked, ticket.head_rows)

    def range(self, begin: int, end: int, first_asked: int, asked: int, head_rows: int) -> Cost:
        """The cost of positions ``begin`` to ``end - 1``, of which ``asked`` from ``first_asked`` on are asked."""
        rows = end - begin
        attention = 0
        for window in self._windows:
            attention += window.pair_flops * (window.pairs(end) - window.pairs(begin))
        last = self._last
        attention += last.pair_flops * (last.pairs(first_asked + asked) - last.pairs(first_asked))
        flops = self._row * rows + self._asked_row * asked + self._head_row * head_rows + attention
        step = min(round(_STEPS * math.log2(max(1, end + begin))), len(self._attention_ns) - 1)
        return Cost(flops, int(self._ns_per_token * rows + attention * self._attention_ns[step]))


def _windows(spec: ModelSpec, layers: list[LayerFlops]) -> list[_Window]:
    pair_flops: Counter[int | None] = Counter()
    for layer, flops in zip(spec.layers, layers, strict=False):
        pair_flops[layer.window] += flops.attention_pair
    return [_Window(window, flops) for window, flops in pair_flops.items()]
