"""A rank's share of the weights, slot by slot: at most one whole slot exists beside what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ..checkpoint import Checkpoint, TensorEntry, audit, dummy_slots, load_slots
from ..models import family
from ..models.common.names import Placement, ignorer, required
from ..models.weights import ExpertBank, ModelWeights, weights_from_slots
from ..shapes import Shape, bank_shapes, slot_shapes
from .share import Share

# Rows of a slot's first dimension (of a bank: experts), uninitialised nowhere: a filled tensor.
Fill = Callable[[str, Shape, range], torch.Tensor]


def load_share(share: Share, fill: Fill) -> tuple[ModelWeights, list[ExpertBank | None]]:
    """The weights that the rank computes with; banks by layer of the whole model, None where it has none."""
    shapes = slot_shapes(share.whole) | bank_shapes(share.whole)
    slots = {
        slot: share.part(slot, fill(slot, shape, _rows(share, slot, shape)))
        for slot, shape in shapes.items()
        if share.holds(slot)
    }
    return _weights(share, slots), [_bank(slots, layer) for layer in range(share.whole.num_layers)]


def dummy_fill(share: Share, *, dtype: torch.dtype, device: torch.device, seed: int, skew: float) -> Fill:
    """Made-up weights, the same on every rank and for any number of ranks."""

    def fill(slot: str, shape: Shape, rows: range) -> torch.Tensor:
        return dummy_slots(
            {slot: shape},
            lambda _, kept: torch.empty(kept, dtype=dtype, device=device),
            seed=seed,
            skew=skew,
            top_k=share.whole.top_k,
            device=device,
            keep=lambda _slot, _shape: rows,
        )[slot]

    return fill


def checkpoint_fill(share: Share, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Fill:
    """Weights of a checkpoint, which is audited as a whole first: ModelError before anything is allocated."""
    spec = share.whole
    place = family(spec.family).placer(spec, checkpoint.entries)
    places = audit(checkpoint, slot_shapes(spec) | bank_shapes(spec), place, required(spec), ignorer(spec))
    stored: dict[str, dict[str, TensorEntry]] = {}
    for name, where in places.items():
        stored.setdefault(where.slot, {})[name] = checkpoint.entries[name]

    def fill(slot: str, shape: Shape, rows: range) -> torch.Tensor:
        nothing: Iterator[tuple[str, Placement]] = iter(())  # what must be there has been audited
        return load_slots(
            replace(checkpoint, entries=stored[slot]),
            {slot: shape},
            place,
            nothing,
            lambda _, kept: torch.empty(kept, dtype=dtype, device=device),
            keep=lambda _slot, _shape: rows,
        )[slot]

    return fill


def _rows(share: Share, slot: str, shape: Shape) -> range:
    return share.experts if slot.startswith("banks.") else range(shape[0])


def _weights(share: Share, slots: dict[str, torch.Tensor]) -> ModelWeights:
    """``layers[i]`` is the i-th layer of this rank's."""
    renamed = dict(slots)
    for slot in [name for name in slots if name.startswith("layers.")]:
        _, layer, inner = slot.split(".", 2)
        renamed[f"layers.{int(layer) - share.layers.start}.{inner}"] = slots[slot]
    mine = share.whole.layers[share.layers.start : share.layers.stop]
    return weights_from_slots(replace(share.spec, layers=mine), renamed)


def _bank(slots: dict[str, torch.Tensor], layer: int) -> ExpertBank | None:
    gate_up, down = slots.get(f"banks.{layer}.gate_up"), slots.get(f"banks.{layer}.down")
    return None if gate_up is None or down is None else ExpertBank(gate_up, down)
