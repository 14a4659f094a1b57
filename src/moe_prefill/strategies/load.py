"""A rank's share of the weights, slot by slot: at most one whole slot exists beside what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ..checkpoint import Checkpoint, TensorEntry, audit, dummy_slots, load_slots, with_scales
from ..engine.quantized import QuantizedRows
from ..experts import BankLayout
from ..models import family
from ..models.common.names import Placement, ignorer, required
from ..models.weights import ExpertBank, ModelWeights, weights_from_slots
from ..ops import Float8Rows, Matrix
from ..residency import DTYPE_BYTES, expert_record
from ..shapes import Shape, bank_shapes, slot_shapes
from .memory import share_float8_slots
from .share import Share

# A filled tensor: these rows of a slot's first dimension (of a bank: experts).
Fill = Callable[[str, Shape, range], torch.Tensor]


def load_share(share: Share, fill: Fill, bank_dtype: str) -> tuple[ModelWeights, list[ExpertBank | None]]:
    """The weights that the rank computes with; banks by layer of the whole model, None where it has none.

    ``bank_dtype``: of the stored experts. With float8 the linear maps are float8, too. Scales are those of the rank's
    own part of a row, however the checkpoint scales its blocks: a rank's part may end within one.
    """
    shapes = {slot: shape for slot, shape in slot_shapes(share.whole).items() if share.holds(slot)}
    float8 = share_float8_slots(share, shapes) if DTYPE_BYTES[bank_dtype] == 1 else set()
    slots: dict[str, Matrix] = {}
    for slot, shape in shapes.items():
        part = share.part(slot, fill(slot, shape, range(shape[0])))
        slots[slot] = Float8Rows.of(part) if slot in float8 else part
    layout = BankLayout(len(share.experts), expert_record(share.spec, bank_dtype))
    sparse = {layer for layer in share.layers if share.whole.layers[layer].sparse}
    banks = [_bank(share, fill, layout, i) if i in sparse else None for i in range(share.whole.num_layers)]
    return _weights(share, slots), banks


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
        stored.setdefault(where.slot, {}).update(with_scales(checkpoint.entries, name))

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


def _weights(share: Share, slots: dict[str, Matrix]) -> ModelWeights:
    """``layers[i]`` is the i-th layer of this rank's."""
    renamed = dict(slots)
    for slot in [name for name in slots if name.startswith("layers.")]:
        _, layer, inner = slot.split(".", 2)
        renamed[f"layers.{int(layer) - share.layers.start}.{inner}"] = slots[slot]
    mine = share.whole.layers[share.layers.start : share.layers.stop]
    return weights_from_slots(replace(share.spec, layers=mine), renamed)


def _bank(share: Share, fill: Fill, layout: BankLayout, layer: int) -> ExpertBank:
    """A bank in the layout that streamed ones have, so that the matrix products see the same strides."""
    shapes = bank_shapes(share.whole)
    views: dict[str, torch.Tensor] = {}
    for field in ("gate_up", "down"):
        slot = f"banks.{layer}.{field}"
        part = share.part(slot, fill(slot, shapes[slot], share.experts))
        if not views:
            views = layout.views(torch.empty(layout.bank_bytes, dtype=torch.uint8, device=part.device))
        scales = views.get(f"{field}_scale")
        for index, expert in enumerate(part):
            target = views[field][index]
            (target if scales is None else QuantizedRows(target, scales[index])).copy_(expert)
    return ExpertBank(**views)
