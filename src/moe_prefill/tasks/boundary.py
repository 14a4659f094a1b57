"""Where a context ends and its labels begin, in tokens.

One rule for every task. The tokens of (context + label) are those of the whole text, where the context's own tokens
are a prefix of them for every label of the row. Where they are not, the context's trailing white space moves to the
front of the labels, as lm-evaluation-harness does it, and the rule is tried again. Where a label still merges with its
context, the row is an error, unless the user asked for "split": both sides are then tokenised alone and put together.

Cost: a context is tokenised once; for each label only the last word of the context and the label are tokenised again
(``Tokenizer.encode_continued``), and equal ones once for all rows of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..core import Int32Array
from ..errors import RowError
from ..text import Tokenizer
from .config import Boundary


@dataclass(frozen=True, slots=True)
class Spot:
    """One context and what may follow it. ``shared``: characters of the context that other contexts have too."""

    context: str
    labels: tuple[str, ...]
    shared: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A context's ids, int32 [T], and the ids of each label after it."""

    context: Int32Array
    labels: tuple[tuple[int, ...], ...]


def split_spots(
    tokenizer: Tokenizer, spots: Sequence[Spot], mode: Boundary = "strict", *, add_bos: bool = True
) -> list[Split | RowError]:
    """Apply the rule to every spot, in order."""
    split = _try(tokenizer, spots, add_bos)
    moved = {i: _moved(spots[i]) for i, found in enumerate(split) if found is None and spots[i].context[-1:].isspace()}
    again = _try(tokenizer, list(moved.values()), add_bos)
    for i, found in zip(moved, again, strict=True):
        split[i] = found
    failed = [spot for spot, found in zip(spots, split, strict=True) if found is None]
    unsplit = (
        _unsplit(tokenizer, spot, ids, mode)
        for spot, ids in zip(failed, _encode(tokenizer, failed, add_bos), strict=True)
    )
    return [found or next(unsplit) for found in split]


def _try(tokenizer: Tokenizer, spots: Sequence[Spot], add_bos: bool) -> list[Split | None]:
    """The first step of the rule."""
    return [_split(rows[0], rows[1:]) for rows in _encode(tokenizer, spots, add_bos)]


def _moved(spot: Spot) -> Spot:
    """The same texts with the context's trailing white space at the front of the labels."""
    context = spot.context.rstrip()
    space = spot.context[len(context) :]
    return Spot(context, tuple(space + label for label in spot.labels), min(spot.shared, len(context)))


def _encode(tokenizer: Tokenizer, spots: Sequence[Spot], add_bos: bool) -> Iterator[list[Int32Array]]:
    """For every spot the ids of its context, then of the context with each label."""
    texts = ((spot.context, spot.shared, spot.labels) for spot in spots)
    return tokenizer.encode_continued(texts, add_special_tokens=add_bos)


def _split(context: Int32Array, wholes: Sequence[Int32Array]) -> Split | None:
    size = len(context)
    if not size or any(not np.array_equal(whole[:size], context) for whole in wholes):
        return None
    return Split(context, tuple(tuple(whole[size:].tolist()) for whole in wholes))


def _unsplit(tokenizer: Tokenizer, spot: Spot, ids: Sequence[Int32Array], mode: Boundary) -> Split | RowError:
    context = ids[0]
    if not len(context):
        return RowError("empty_text", "the context has no tokens; give the prompt some text before its labels")
    if mode == "split":
        labels = (tokenizer.encode_continuation(label) for label in spot.labels)
        return Split(context, tuple(tuple(label.tolist()) for label in labels))
    return RowError("label_boundary", _describe(tokenizer, spot, ids))


def _describe(tokenizer: Tokenizer, spot: Spot, ids: Sequence[Int32Array]) -> str:
    end, context = repr(spot.context[-20:]), ids[0]
    for label, whole in zip(spot.labels, ids[1:], strict=True):
        if not np.array_equal(whole[: len(context)], context):
            return (
                f"label {label!r} merges with the end of its context {end}: the last token of the context is "
                f"{tokenizer.token_string(int(context[-1]))!r} alone and another one before the label. End the context "
                "with other text, change the label's prefix (--label-prefix), or accept it with --boundary split"
            )
    return f"the labels do not follow the context {end} on a token boundary; --boundary split accepts that"
