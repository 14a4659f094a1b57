"""Float8 matrices with a float32 scale for each block of 128 x 128, as checkpoints publish them.

The scales of a tensor lie beside it, under its name with ``_scale_inv`` behind: one row of scales for each 128 rows and
one column for each 128 columns, begun ones included. Several matrices that are stored as one (gate and up of experts)
may have grids of their own, one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ModelError
from ..ops import BLOCK
from .headers import SCALE_SUFFIX, TensorEntry
from .slots import Shape

STORED_FLOAT8 = "F8_E4M3"  # as safetensors names the type
SCALE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class BlockScales:
    """The stored scales of one tensor, whose every matrix consists of ``parts`` with a grid each."""

    entry: TensorEntry
    parts: int


def is_scaled(entry: TensorEntry) -> bool:
    return entry.dtype == STORED_FLOAT8


def with_scales(entries: Mapping[str, TensorEntry], name: str) -> dict[str, TensorEntry]:
    """A tensor by its name, and its scales if there are any."""
    return {each: entries[each] for each in (name, name + SCALE_SUFFIX) if each in entries}


def scales_of(entries: Mapping[str, TensorEntry], name: str, parts: int) -> BlockScales | str:
    """The scales of the float8 tensor ``name``, or what is wrong with them. ``parts``: of how many matrices of equal
    height each of its matrices may consist.
    """
    weight, scale = entries[name], entries.get(name + SCALE_SUFFIX)
    if scale is None:
        return f"{name} has no {name + SCALE_SUFFIX}"
    if scale.dtype not in SCALE_DTYPES:
        return f"{scale.name} is {scale.dtype} where {', '.join(SCALE_DTYPES)} are read"
    grids = {each: _grid(weight.shape, each) for each in (parts, 1) if weight.shape[-2] % each == 0}
    for each, grid in grids.items():
        if scale.shape == grid:
            return BlockScales(scale, each)
    wanted = " or ".join(str(list(grid)) for grid in dict.fromkeys(grids.values()))
    return f"{scale.name} is {list(scale.shape)} where blocks of {list(weight.shape)} need {wanted}"


def check_scales(name: str, scale: torch.Tensor) -> None:
    """ModelError where a scale is negative, infinite or not a number."""
    wrong = int((~((scale >= 0) & torch.isfinite(scale))).sum())
    if wrong:
        raise ModelError(
            f"{name} has {wrong:,} of {scale.numel():,} scales that are negative or not finite. Download the "
            "checkpoint again; if it is as published, its quantisation failed."
        )


def _grid(shape: Shape, parts: int) -> Shape:
    height = -(-(shape[-2] // parts) // BLOCK) * parts
    return (*shape[:-2], height, -(-shape[-1] // BLOCK))
