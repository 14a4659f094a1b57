"""``--check-finite``: which tensor of a checkpoint, or which part of which layer, first gives NaN or infinity.

Weights are looked through once, when they are loaded. During sweeps every part of every layer leaves a flag on the
device; flags are read when a sweep's results are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..core import ModelSpec
from ..errors import ModelError
from ..models.common.names import required
from ..models.decoder import Decoder, LayerOutput, Rope
from ..models.weights import AttentionWeights, ExpertBank, LayerWeights, ModelWeights
from ..ops import FLOAT8, Rows
from .quantized import Quantized

_NAMED = 5  # how many tensors an error names
Note = tuple[int, str, torch.Tensor]  # layer, part, bool: it holds a number that is not finite
_PARTS = ("keys and values", "queries", "attention", "output projection", "experts or feed-forward")


def check_weights(spec: ModelSpec, slots: Mapping[str, Any], kept: Mapping[str, range]) -> None:
    """ModelError that names the tensors of the checkpoint with NaN or infinity, and how many values they are.

    ``slots`` are filled; of a bank they hold the experts ``kept``.
    """
    found = [fault for slot, filled in slots.items() for fault in _faults(spec, slot, filled, kept.get(slot))]
    if found:
        more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
        raise ModelError(
            f"{len(found):,} tensors hold values that are not finite: {'; '.join(found[:_NAMED])}{more}. Download the "
            "checkpoint again; if it is as published, it cannot be computed."
        )


def _faults(spec: ModelSpec, slot: str, filled: Any, kept: range | None) -> Iterator[str]:
    for index, part in enumerate(filled) if slot.startswith("banks.") else ((None, filled),):
        rows = _wrong_values(part)
        if not rows.any():
            continue
        expert = None if index is None else (kept or range(len(filled)))[index]
        for name, where in required(spec):
            if (where.slot, where.expert) == (slot, expert):
                wrong = int(rows[where.row : None if where.rows is None else where.row + where.rows].sum())
                if wrong:
                    yield f"{name} ({wrong:,} values)"


def _wrong_values(part: torch.Tensor | Quantized) -> torch.Tensor:
    """How many values of each row are not finite, int64 [rows]."""
    if isinstance(part, Quantized):
        return _wrong_values(part.values) + part.rows_without_scale()
    wrong = (part.view(torch.uint8) & 0x7F) == 0x7F if part.dtype == FLOAT8 else ~torch.isfinite(part)
    return wrong.flatten(1).sum(1) if wrong.ndim > 1 else wrong.long()


class WatchedDecoder(Decoder):
    """The same mathematics; each part of a layer notes whether what it gives is finite."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights) -> None:
        super().__init__(spec)
        self._index = {id(layer.attention): index for index, layer in enumerate(weights.layers)}
        self._notes: list[Note] = []  # chunks may be computed side by side: lists grow safely

    def keys_values(
        self, weights: AttentionWeights, normed_TD: Rows, rope: Rope, out_T2Gd: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._note(weights, 0, super().keys_values(weights, normed_TD, rope, out_T2Gd))

    def queries(self, weights: AttentionWeights, normed_TD: Rows, rope: Rope) -> torch.Tensor:
        return self._note(weights, 1, super().queries(weights, normed_TD, rope))

    def add_attended_(self, layer: LayerWeights, attended_THd: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        self._note(layer.attention, 2, attended_THd)
        normed = super().add_attended_(layer, attended_THd, residual_TD)
        self._note(layer.attention, 3, residual_TD)
        return normed

    def feed_forward(
        self,
        layer: LayerWeights,
        x_TD: torch.Tensor,
        normed_TD: torch.Tensor,
        bank: ExpertBank | None,
        out: LayerOutput,
    ) -> None:
        super().feed_forward(layer, x_TD, normed_TD, bank, out)
        self._note(layer.attention, 4, out.residual)

    def take_notes(self) -> list[Note]:
        """Those of everything computed since the last call; still being computed on a GPU."""
        notes, self._notes = self._notes, []
        return notes

    def _note(self, weights: AttentionWeights, part: int, values: torch.Tensor) -> torch.Tensor:
        self._notes.append((self._index[id(weights)], _PARTS[part], ~torch.isfinite(values).all()))
        return values


def first_fault(notes: Iterable[Note]) -> str | None:
    """The first part of the first layer that gave NaN or infinity; None: all were finite. Waits for the flags."""
    wrong = {(layer, _PARTS.index(part)) for layer, part, flag in notes if bool(flag)}
    if not wrong:
        return None
    layer, part = min(wrong)
    return f"layer {layer}: {_PARTS[part]}"
