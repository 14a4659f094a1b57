"""The level of every layer: where its bank lives, how levels are spread over depth, and how a user writes them down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from ..core import Level, ModelSpec
from ..errors import UsageError

Levels = tuple[Level | None, ...]  # one a layer; None: the layer is dense

LETTERS: dict[Level | None, str] = {"resident": "R", "sharded": "S", "offloaded": "O", "hybrid": "H", None: "-"}
_BY_LETTER = {letter: level for level, letter in LETTERS.items()}
_WORDS: dict[str, Level | None] = {**{level: level for level in get_args(Level)}, "dense": None}


def spread(total: int, chosen: int) -> list[int]:
    """``chosen`` of ``total`` places, as far apart as can be, counting from the last place round to the first.

    Gaps differ by at most one, and the first is as late as they allow: with ``spread(7, 3) == [1, 3, 6]``, two, two and
    three places end with a chosen one.
    """
    return [(index + 1) * total // chosen - 1 for index in range(chosen)]


def levels_of(spec: ModelSpec, counts: Mapping[Level, int]) -> Levels:
    """Give each sparse layer a level: banks that do not stay are spread over depth, and among these the ones that come
    from the host.
    """
    sparse = [index for index, layer in enumerate(spec.layers) if layer.sparse]
    assert sum(counts.values()) == len(sparse), (counts, len(sparse))
    levels: list[Level | None] = ["resident" if layer.sparse else None for layer in spec.layers]
    streamed = [sparse[place] for place in spread(len(sparse), len(sparse) - counts.get("resident", 0))]
    for index in streamed:
        levels[index] = "sharded"
    for index in (streamed[place] for place in spread(len(streamed), counts.get("hybrid", 0))):
        levels[index] = "hybrid"
    for index in (streamed[place] for place in spread(len(streamed), counts.get("offloaded", 0))):
        levels[index] = "offloaded"
    return tuple(levels)


def prefetch_depth(levels: Levels, pinned: int | None = None) -> int:
    """How many banks, or staged shards, fill ahead of the one that is read."""
    return pinned or (2 if "hybrid" in levels else 1)


def bank_buffers(levels: Levels, pinned_depth: int | None = None) -> int:
    """One bank is read while others fill; where shards are staged first, one fills from those."""
    if not num_streamed(levels):
        return 0
    return 2 if "hybrid" in levels else prefetch_depth(levels, pinned_depth) + 1


def staged_shards(levels: Levels, pinned_depth: int | None = None) -> int:
    """Shards of this rank on their way from the host to the peers."""
    return prefetch_depth(levels, pinned_depth) + 1 if "hybrid" in levels else 0


def num_streamed(levels: Levels) -> int:
    """Layers whose bank moves."""
    return sum(level not in (None, "resident") for level in levels)


def residency_map(levels: Sequence[Level | None]) -> str:
    """One letter a layer: R resident, S sharded, O offloaded, H hybrid, - dense. ``parse_residency`` reads it."""
    return "".join(LETTERS[level] for level in levels)


def parse_residency(text: str, spec: ModelSpec, ranks: int) -> Levels | None:
    """The levels that a user pins, or None for ``auto``.

    One level for all layers; one a layer, as a map of letters (``residency_map``) or as words with commas between;
    or counts (``resident:10,offloaded:38``), which are spread over depth. UsageError: an unknown level, a number of
    layers that is not the model's, a level at a dense layer, a level that this number of GPUs does not have.
    """
    levels = _parsed(text.strip(), spec)
    if levels is None:
        return None
    _check_dense(levels, spec, text)
    _check_ranks(levels, ranks)
    return levels


def _parsed(text: str, spec: ModelSpec) -> Levels | None:
    if text == "auto":
        return None
    if (level := _WORDS.get(text)) is not None:
        return levels_of(spec, {level: spec.num_sparse_layers})
    if ":" in text:
        return levels_of(spec, _counts(text, spec))
    if set(text) <= set(_BY_LETTER) and text:
        entries: list[Level | None] = [_BY_LETTER[letter] for letter in text]
    else:
        entries = [_level(word) for word in text.split(",")]
    if len(entries) != spec.num_layers:
        raise UsageError(
            f"--residency names {len(entries)} layers, and the model has {spec.num_layers} "
            f"({spec.num_sparse_layers} with experts); give one level a layer ('dense' or - where there are no "
            "experts), one for all, or counts like resident:10,offloaded:38"
        )
    return tuple(entries)


def _counts(text: str, spec: ModelSpec) -> dict[Level, int]:
    counts: dict[Level, int] = {}
    for part in text.split(","):
        word, _, number = part.partition(":")
        level = _level(word)
        if level is None or not number.strip().isdecimal() or level in counts:
            raise UsageError(f"--residency has {part!r}; give each level once with a count, as in resident:10")
        counts[level] = int(number)
    if sum(counts.values()) != spec.num_sparse_layers:
        raise UsageError(
            f"--residency counts {sum(counts.values())} layers, and {spec.num_sparse_layers} layers of the model have "
            "experts; the counts must add up to that"
        )
    return counts


def _level(word: str) -> Level | None:
    if word.strip() not in _WORDS:
        raise UsageError(f"--residency has {word.strip()!r}; it may say auto, {', '.join(_WORDS)}")
    return _WORDS[word.strip()]


def _check_dense(levels: Levels, spec: ModelSpec, text: str) -> None:
    wrong = [i for i, layer in enumerate(spec.layers) if layer.sparse != (levels[i] is not None)]
    if wrong:
        kind = "has experts" if spec.layers[wrong[0]].sparse else "is dense"
        given = levels[wrong[0]] or "dense"
        raise UsageError(f"--residency says {given} for layer {wrong[0]}, which {kind}; change that entry")


def _check_ranks(levels: Levels, ranks: int) -> None:
    for level in levels:
        if ranks == 1 and level in ("sharded", "hybrid"):
            raise UsageError(f"--residency {level} needs at least two GPUs, and there is 1; use offloaded or resident")
        if ranks > 1 and level == "offloaded":
            raise UsageError(
                f"--residency offloaded is for one GPU, and there are {ranks}; use hybrid, where each brings its part "
                "from the host, or sharded"
            )
