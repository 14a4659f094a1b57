"""What the ways of filling tensors share: who allocates a slot, and which part of it this process keeps.

A slot is a named tensor of the model in this project's own terms; its first dimension is experts in a bank, rows
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch

Shape = tuple[int, ...]
# The tensor to fill for a slot, uninitialised, of exactly this shape; its dtype and device are the caller's choice.
Allocate = Callable[[str, Shape], torch.Tensor]
# The part of a slot's first dimension that this process keeps; an empty range leaves the slot out.
Keep = Callable[[str, Shape], range]


class Placement(Protocol):
    """Where a tensor goes: ``rows`` rows of a slot (None: the rest) from ``row`` on, of ``expert`` if that is set.
    ``parts``: how many matrices of equal height it stacks, where they have scales of their own.
    """

    @property
    def slot(self) -> str: ...
    @property
    def row(self) -> int: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def expert(self) -> int | None: ...
    @property
    def parts(self) -> int: ...


@runtime_checkable
class BlockTarget(Protocol):
    """A place that keeps float8 matrices and the scales of their blocks as they are stored."""

    def copy_blocks(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        """``values`` float8 of the place's shape, ``scale`` float32 with a row for each 128 of its rows."""


def keep_all(slot: str, shape: Shape) -> range:
    return range(shape[0])


def kept_ranges(shapes: Mapping[str, Shape], keep: Keep | None) -> dict[str, range]:
    """The kept part of every slot that has one."""
    kept = {slot: (keep or keep_all)(slot, shape) for slot, shape in shapes.items()}
    for slot, part in kept.items():
        assert 0 <= part.start <= part.stop <= shapes[slot][0], (slot, part, shapes[slot])
    return {slot: part for slot, part in kept.items() if len(part)}


def allocated(slot: str, shape: Shape, part: range, allocate: Allocate) -> torch.Tensor:
    """A tensor for the kept part of a slot."""
    wanted = (len(part), *shape[1:])
    tensor = allocate(slot, wanted)
    assert tuple(tensor.shape) == wanted, (slot, tuple(tensor.shape), wanted)
    return tensor
