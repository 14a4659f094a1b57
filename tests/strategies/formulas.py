"""Bytes that a device sends in one layer, as docs/communication.md derives them: from shapes and routing alone.

N ranks, D hidden, K top-k, b bytes an element; ``float8``: rows to the experts travel quantised. ``sweeps``: (tokens,
rows of the last layer) of each, by rank.
"""

from fractions import Fraction
from itertools import zip_longest

import numpy as np

from moe_prefill.core import ModelSpec

Sweeps = list[tuple[int, int]]


def rows_in(layer: int, spec: ModelSpec, sweep: tuple[int, int]) -> int:
    return sweep[int(layer == spec.num_layers - 1)]


def tensor_parallel(spec: ModelSpec, layer: int, size: int, sweeps: Sweeps, element: int) -> Fraction:
    """Two all-reduces of the rows, and two of a float32 a row where a norm spans all heads."""
    rows, tokens = sum(rows_in(layer, spec, sweep) for sweep in sweeps), sum(sweep[0] for sweep in sweeps)
    reduced = 2 * rows * spec.hidden_size * element
    if spec.qk_norm == "full":
        reduced += 4 * (tokens + rows)
    return Fraction(2 * (size - 1), size) * reduced


def chunks(total: int, most: int) -> list[int]:
    count = -(-total // most)
    return [(index + 1) * total // count - index * total // count for index in range(count)]


def steps(spec: ModelSpec, layer: int, sweeps: list[Sweeps], chunk_rows: int) -> list[int]:
    """Rows of the longest rank in every step of a layer, over all sweeps."""
    longest = []
    for together in zip_longest(*sweeps, fillvalue=(0, 0)):
        cut = [chunks(rows_in(layer, spec, sweep), chunk_rows) for sweep in together]
        longest += [max(sizes) for sizes in zip_longest(*cut, fillvalue=0)]
    return longest


def row_to_experts(spec: ModelSpec, element: int, float8: bool) -> int:
    """A row with the weights and ids of K experts, and the scale of a float8 one."""
    return spec.hidden_size * (1 if float8 else element) + 8 * spec.top_k + (4 if float8 else 0)


def token_gather(spec: ModelSpec, layer: int, sweeps: list[Sweeps], chunk_rows: int, element: int, float8: bool) -> int:
    """Rows to everybody, and partial sums back; every rank as many as the longest."""
    if not spec.layers[layer].sparse:
        return 0
    rows = sum(steps(spec, layer, sweeps, chunk_rows))
    return (len(sweeps) - 1) * rows * (row_to_experts(spec, element, float8) + spec.hidden_size * element)


def expert_dispatch(
    spec: ModelSpec,
    layer: int,
    rank: int,
    ids: list[list[np.ndarray]],
    sweeps: list[Sweeps],
    chunk_rows: int,
    element: int,
    float8: bool,
) -> int:
    """``ids``: what each rank's tokens chose. A row once to every other rank that it needs, a sum back from there, and
    two int64 a step to everybody.
    """
    if not spec.layers[layer].sparse:
        return 0
    size = len(ids)
    owner = np.concatenate(
        [np.full((r + 1) * spec.num_experts // size - r * spec.num_experts // size, r) for r in range(size)]
    )

    def rows_between(home: int, away: int) -> int:
        return sum(int((owner[chosen] == away).any(axis=1).sum()) for chosen in ids[home])

    others = [other for other in range(size) if other != rank]
    sent = sum(rows_between(rank, other) for other in others) * row_to_experts(spec, element, float8)
    returned = sum(rows_between(other, rank) for other in others) * spec.hidden_size * element
    return sent + returned + 16 * len(others) * len(steps(spec, layer, sweeps, chunk_rows))


def pipeline(spec: ModelSpec, layer: int, size: int, sweeps: Sweeps, element: int) -> int:
    """The residual, after the last layer of every stage but the last."""
    ends = [(rank + 1) * spec.num_layers // size - 1 for rank in range(size - 1)]
    return sum(tokens for tokens, _ in sweeps) * spec.hidden_size * element if layer in ends else 0
