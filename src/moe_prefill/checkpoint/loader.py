"""From a checkpoint to filled slots, with an audit before the first byte and a recount after the last.

The audit needs only headers, so a checkpoint that does not fit its config fails in a moment and before any allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import ModelError
from .headers import SCALE_SUFFIX, Checkpoint, TensorEntry
from .reader import DTYPES, PieceReader
from .scales import BlockScales, is_scaled, scales_of
from .slots import Allocate, Keep, Placement, Shape, allocated, kept_ranges

Place = Callable[[str], Placement | None]
Region = tuple[str, int | None, int]  # slot, expert, first row
_NAMED = 5  # how many offenders an error names


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows of a stored tensor go to a slot's kept part, or to matrix ``index`` of it, from ``row`` on."""

    entry: TensorEntry
    rows: range
    slot: str
    index: int | None
    row: int
    scales: BlockScales | None = None


def load_slots(
    checkpoint: Checkpoint,
    shapes: Mapping[str, Shape],
    place: Place,
    required: Iterable[tuple[str, Placement]],
    allocate: Allocate,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    keep: Keep | None = None,
) -> dict[str, torch.Tensor]:
    """Fill every slot of ``shapes`` from the checkpoint, piece by piece in file order.

    ``place`` says where a tensor goes; ``required`` lists the places that must be filled with the names of the tensors
    that usually do; both may know slots that ``shapes`` does not. ``ignore`` names tensors that may be left over.
    ``keep`` limits what is allocated and read to a part of each slot's first dimension. Host memory beside the
    destinations: see ``reader``. ModelError: tensors missing, left over, of the wrong shape or type, or given twice,
    scales of float8 tensors that are missing or misshapen, with counts and the first few names.
    """
    placements = audit(checkpoint, shapes, place, required, ignore)
    kept = kept_ranges(shapes, keep)
    slots = {slot: allocated(slot, shapes[slot], part, allocate) for slot, part in kept.items()}
    filled = dict.fromkeys(slots, 0)
    with PieceReader() as reader:
        for copy in _copies(checkpoint, placements, kept):
            target = slots[copy.slot] if copy.index is None else slots[copy.slot][copy.index]
            target = target[copy.row : copy.row + len(copy.rows)]
            reader.copy_rows(copy.entry, copy.rows, target, copy.scales)
            filled[copy.slot] += target.numel()
    short = {slot: (count, slots[slot].numel()) for slot, count in filled.items() if count != slots[slot].numel()}
    assert not short, short
    return slots


def audit(
    checkpoint: Checkpoint,
    shapes: Mapping[str, Shape],
    place: Place,
    required: Iterable[tuple[str, Placement]],
    ignore: Callable[[str], bool] = lambda name: False,
) -> dict[str, Placement]:
    """The place of every tensor that is to be read, or one ModelError that says all that is wrong."""
    placements: dict[str, Placement] = {}
    filled: dict[Region, str] = {}
    faults: dict[str, list[str]] = {
        "left over": [],
        "of the wrong shape": [],
        "of the wrong type": [],
        "given twice": [],
        "without scales that fit": [],
    }
    for name, entry in checkpoint.entries.items():
        where = place(name)
        if where is None or where.slot not in shapes:
            if not ignore(name) and not _scales_another(checkpoint.entries, shapes, place, name):
                faults["left over"].append(name)
            continue
        placements[name] = where
        wanted = _shape_at(where, shapes[where.slot])
        if entry.shape != wanted:
            faults["of the wrong shape"].append(f"{name} is {list(entry.shape)} where config.json needs {list(wanted)}")
        if is_scaled(entry) and len(entry.shape) > 1:
            scales = scales_of(checkpoint.entries, name, where.parts)
            if isinstance(scales, str):
                faults["without scales that fit"].append(scales)
        elif entry.dtype not in DTYPES:
            faults["of the wrong type"].append(f"{name} is {entry.dtype} where {', '.join(DTYPES)} are read")
        if filled.setdefault(_region(where), name) != name:
            faults["given twice"].append(name)
    faults["given twice"] += [
        name for (slot, expert, _), name in filled.items() if expert is not None and (slot, None, 0) in filled
    ]
    faults["missing"] = [name for name, where in required if where.slot in shapes and not _is_filled(where, filled)]
    if any(faults.values()):
        raise ModelError(f"{checkpoint.directory} does not fit its config.json. {' '.join(_listed(faults))}")
    return placements


def _copies(checkpoint: Checkpoint, placements: Mapping[str, Placement], kept: Mapping[str, range]) -> Iterator[Copy]:
    """What to copy where, in file order, leaving out what is not kept."""
    for name, where in placements.items():
        part, entry = kept.get(where.slot), checkpoint.entries[name]
        if part is None:
            continue
        scales = scales_of(checkpoint.entries, name, where.parts) if is_scaled(entry) else None
        assert not isinstance(scales, str), scales
        if where.expert is not None:
            if where.expert in part:
                yield Copy(entry, range(entry.shape[0]), where.slot, where.expert - part.start, where.row, scales)
            continue
        first, last = max(where.row, part.start), min(where.row + entry.shape[0], part.stop)
        if first < last:
            rows = range(first - where.row, last - where.row)
            yield Copy(entry, rows, where.slot, None, first - part.start, scales)


def _scales_another(entries: Mapping[str, TensorEntry], shapes: Mapping[str, Shape], place: Place, name: str) -> bool:
    """Whether a tensor holds the scales of a float8 tensor that has a place."""
    weight = entries.get(name.removesuffix(SCALE_SUFFIX))
    if weight is None or weight.name == name or not is_scaled(weight):
        return False
    where = place(weight.name)
    return where is not None and where.slot in shapes


def _shape_at(where: Placement, slot_shape: Shape) -> Shape:
    shape = slot_shape if where.expert is None else slot_shape[1:]
    return (shape[0] - where.row if where.rows is None else where.rows, *shape[1:])


def _region(where: Placement) -> Region:
    return where.slot, where.expert, where.row


def _is_filled(where: Placement, filled: Mapping[Region, str]) -> bool:
    """A place is filled by a tensor of its own or, in a bank, by one that fills the whole slot."""
    return _region(where) in filled or (where.expert is not None and (where.slot, None, 0) in filled)


def _listed(faults: Mapping[str, list[str]]) -> Iterator[str]:
    for kind, names in faults.items():
        if names:
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            yield f"Tensors {kind} ({len(names):,}): {'; '.join(names[:_NAMED])}{more}."
