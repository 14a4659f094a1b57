"""A model's weights, from a checkpoint or made up, as the mathematics reads them: where models and checkpoints meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch

from ..checkpoint import (
    Allocate,
    Checkpoint,
    Keep,
    dummy_slots,
    kept_ranges,
    load_slots,
    open_checkpoint,
    read_config,
    resolve_directory,
    same_values,
)
from ..core import ModelSpec
from ..errors import UsageError
from ..models import family, preset, preset_names, spec_from_hf
from ..models.common.config import declared_dtype
from ..models.common.names import ignorer, required
from ..models.weights import ExpertBank, ModelWeights, weights_from_slots
from ..ops import BLOCK, FLOAT8, Matrix
from ..shapes import Shape, bank_shapes, block_slots, float8_slots, slot_shapes
from .finite import check_weights
from .quantized import Quantized, QuantizedBlocks, QuantizedRows

LoadFormat = Literal["safetensors", "dummy"]
Slots = dict[str, torch.Tensor]
Loaded = tuple[ModelSpec, ModelWeights, list[ExpertBank | None]]


def load_weights(
    source: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    load_format: LoadFormat = "safetensors",
    seed: int = 0,
    skew: float = 1.0,
    num_layers: int | None = None,
    allocate: Allocate | None = None,
    keep: Keep | None = None,
    float8: bool = False,
    blocks: bool = False,
    check_finite: bool = False,
) -> Loaded:
    """The spec, everything but the experts, and each layer's bank (None: the layer is dense, or its bank is not kept).

    ``source`` is a model directory, or a hub id with its ``revision``; with ``dummy`` also the name of a preset. Slots
    go to ``device``, in ``dtype`` or the published one. Two callbacks are asked for banks (``banks.<layer>.gate_up``
    and ``.down``): ``allocate``, where a slot lives, and ``keep``, which of the layer's experts to hold, possibly none.
    ``float8``: linear maps beside the experts are kept in float8 with a scale a row, quantised while loading; with
    ``blocks`` those that consist of whole blocks with a scale for each block of 128 x 128, which are not quantised
    again where they are published so.
    ``check_finite``: ModelError for NaN or infinity among the weights.
    ``seed``, ``skew`` and ``num_layers`` (to cut the model short) are for dummy weights, which are drawn on ``device``
    wherever they end up.
    """
    spec, checkpoint = open_model(source, load_format, num_layers, revision)
    shapes, keep = slot_shapes(spec) | bank_shapes(spec), _banks_only(keep)
    forms = dict.fromkeys(float8_slots(shapes), rows_place) if float8 else {}
    forms |= dict.fromkeys(block_slots(spec), blocks_place) if float8 and blocks else {}
    allocate = _allocator(dtype or getattr(torch, spec.dtype), torch.device(device), forms, allocate)
    if checkpoint is None:
        slots = dummy_slots(shapes, allocate, seed=seed, skew=skew, top_k=spec.top_k, device=device, keep=keep)
    else:
        place = family(spec.family).placer(spec, checkpoint.entries)
        slots = load_slots(checkpoint, shapes, place, required(spec), allocate, ignore=ignorer(spec), keep=keep)
    if check_finite:
        check_weights(spec, slots, kept_ranges(shapes, keep))
    banks = [_bank(slots, layer) for layer in range(spec.num_layers)]
    matrices = {name: filled(slot) for name, slot in slots.items() if not name.startswith("banks.")}
    return spec, weights_from_slots(spec, matrices), banks


def filled(slot: torch.Tensor | Quantized) -> Matrix:
    """A slot that the loader is through with, as the mathematics reads it."""
    return slot.matrix() if isinstance(slot, Quantized) else slot


def rows_place(shape: Shape, device: torch.device) -> Quantized:
    """A place for a linear map with a scale a row."""
    return QuantizedRows(torch.empty(shape, dtype=FLOAT8, device=device), torch.empty(shape[:-1], device=device))


def blocks_place(shape: Shape, device: torch.device) -> Quantized:
    """A place for a linear map of whole blocks with a scale each."""
    scales = torch.empty([size // BLOCK for size in shape], device=device)
    return QuantizedBlocks(torch.empty(shape, dtype=FLOAT8, device=device), scales)


def open_model(
    source: str | Path,
    load_format: LoadFormat = "safetensors",
    num_layers: int | None = None,
    revision: str | None = None,
) -> tuple[ModelSpec, Checkpoint | None]:
    """The spec of a model and, unless its weights are made up, its checkpoint; reads no tensor but tied embeddings."""
    if load_format == "dummy":
        spec = spec_from_hf(_config_without_weights(source, revision))
        return replace(spec, layers=spec.layers[: num_layers or spec.num_layers]), None
    if num_layers is not None:
        said = f"is {num_layers}, which needs dummy weights (--load-format dummy); a checkpoint is loaded whole"
        raise UsageError.about("num_layers", said)
    directory = resolve_directory(source, revision=revision)
    config = read_config(directory)
    spec, checkpoint = spec_from_hf(config), open_checkpoint(directory)
    return _as_stored(spec, declared_dtype(config), checkpoint), checkpoint


def _config_without_weights(source: str | Path, revision: str | None) -> dict[str, object]:
    is_preset = str(source).rpartition("/")[2].casefold() in {name.casefold() for name in preset_names()}
    if is_preset and revision is None and not Path(source).is_dir():
        return preset(str(source))
    return read_config(resolve_directory(source, revision=revision, weights=False))


def _as_stored(spec: ModelSpec, declared: str | None, checkpoint: Checkpoint) -> ModelSpec:
    """As in the reference: a dtype left out of the config is the stored one, embeddings that differ are not tied."""
    dtype = spec.dtype if declared else checkpoint.dtype or spec.dtype
    ends = ("embed_tokens.weight", "lm_head.weight")
    names = [name for name in checkpoint.entries if name.removeprefix("model.") in ends]
    differ = spec.tie_embeddings and len(names) == 2 and not same_values(checkpoint, *names)
    return replace(spec, dtype=dtype, tie_embeddings=spec.tie_embeddings and not differ)


def _allocator(
    dtype: torch.dtype,
    device: torch.device,
    float8: Mapping[str, Callable[[Shape, torch.device], Quantized]],
    banks: Allocate | None,
) -> Allocate:
    def allocate(slot: str, shape: Shape) -> torch.Tensor:
        if banks is not None and slot.startswith("banks."):
            return banks(slot, shape)
        if slot in float8:
            return cast("torch.Tensor", float8[slot](shape, device))
        return torch.empty(shape, dtype=dtype, device=device)

    return allocate


def _banks_only(keep: Keep | None) -> Keep | None:
    if keep is None:
        return None
    return lambda slot, shape: keep(slot, shape) if slot.startswith("banks.") else range(shape[0])


def _bank(slots: Slots, layer: int) -> ExpertBank | None:
    gate_up, down = slots.get(f"banks.{layer}.gate_up"), slots.get(f"banks.{layer}.down")
    return None if gate_up is None or down is None else ExpertBank(gate_up, down)
