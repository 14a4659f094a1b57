"""Labels of any number of tokens as atomic requests, each position asked once.

The labels of a row form a trie below the context. Every inner node is a position whose next-token distribution is
needed, and its children are the ids to ask there. A request walks from the context down to one deepest inner node;
together the requests visit every inner node, and each node is asked by the first that visits it. The score of a label
is the sum of log-probabilities along its path.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core import AtomicRequest, AtomicResult, Int32Array
from ..errors import TaskError

Float64Array = npt.NDArray[np.float64]
LabelIds = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Ask:
    """One request without its context: ``suffix`` int32 [D], asked ``depths`` int32 [A] into it, ids and offsets."""

    suffix: Int32Array
    depths: Int32Array
    ids: Int32Array
    id_offsets: Int32Array


@dataclass(frozen=True, slots=True, eq=False)
class LabelPlan:
    """How to ask for N labels.

    ``steps`` int64 [S] index the answers of all requests, label after label; ``starts`` int64 [N] index ``steps``.
    """

    asks: tuple[_Ask, ...]
    steps: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    vocabulary: bool
    longest: int  # tokens that the longest request adds to the context

    def requests(self, context: Int32Array) -> tuple[AtomicRequest, ...]:
        """The requests that score all labels after ``context``, int32 [T]."""
        last = np.int32(len(context) - 1)
        return tuple(
            AtomicRequest(
                np.concatenate([context, ask.suffix]) if len(ask.suffix) else context,
                ask.depths + last,
                ask.ids,
                ask.id_offsets,
                self.vocabulary,
            )
            for ask in self.asks
        )

    def scores(self, requests: Sequence[AtomicRequest], results: Sequence[AtomicResult]) -> Float64Array:
        """Float64 [N]: log-probabilities of the labels, or bare logits where the vocabulary was not asked."""
        values = [
            result.logprobs(request) if self.vocabulary else result.logits
            for request, result in zip(requests, results, strict=True)
        ]
        flat = np.concatenate(values).astype(np.float64)
        return np.add.reduceat(flat[self.steps], self.starts)


@functools.lru_cache(maxsize=4096)
def plan_labels(labels: LabelIds, vocabulary: bool = False) -> LabelPlan:
    """Plan the requests for distinct, prefix-free labels (``check_labels``).

    The log-partition is asked with ``vocabulary``, and wherever a label has several tokens: logits of different
    positions have no common scale.
    """
    nodes: dict[tuple[int, ...], list[int]] = {}
    for label in labels:
        for depth, token in enumerate(label):
            children = nodes.setdefault(label[:depth], [])
            if token not in children:
                children.append(token)
    inner = {node[:depth] for node in nodes for depth in range(len(node))}
    asks: list[_Ask] = []
    place: dict[tuple[int, ...], int] = {}
    taken: set[tuple[int, ...]] = set()
    for deepest in (node for node in nodes if node not in inner):
        path = [deepest[:depth] for depth in range(len(deepest) + 1) if deepest[:depth] not in taken]
        taken.update(path)
        for node in path:
            for token in nodes[node]:
                place[(*node, token)] = len(place)
        asks.append(_ask(deepest, [(len(node), nodes[node]) for node in path]))
    lengths = np.array([len(label) for label in labels], dtype=np.int64)
    steps = [place[label[: depth + 1]] for label in labels for depth in range(len(label))]
    return LabelPlan(
        tuple(asks),
        np.array(steps, dtype=np.int64),
        np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        lengths,
        vocabulary or bool((lengths > 1).any()),
        max(len(node) for node in nodes),
    )


def check_labels(labels: LabelIds, names: Sequence[str], remedy: str) -> None:
    """Raise TaskError where a label has no tokens, equals another, or is a proper token prefix of another."""
    first: dict[tuple[int, ...], str] = {}
    for label, name in zip(labels, names, strict=True):
        if not label:
            raise TaskError(f"label {name!r} has no tokens; give it a text")
        if label in first:
            raise TaskError(
                f"labels {first[label]!r} and {name!r} are the same tokens {list(label)}; drop or rename one"
            )
        first[label] = name
    for label, name in first.items():
        shorter = next((first[label[:depth]] for depth in range(1, len(label)) if label[:depth] in first), None)
        if shorter is not None:
            raise TaskError(
                f"label {shorter!r} is a token prefix of label {name!r}, so its probability would hold the other's; "
                f"{remedy}"
            )


def softmax(scores: Float64Array) -> Float64Array:
    """Normalise log scores over the candidates, float64 [N]."""
    shifted: Float64Array = np.exp(scores - scores.max())
    return np.asarray(shifted / shifted.sum(), dtype=np.float64)


def _ask(deepest: tuple[int, ...], asked: Sequence[tuple[int, Sequence[int]]]) -> _Ask:
    counts = [len(ids) for _, ids in asked]
    return _Ask(
        np.array(deepest, dtype=np.int32),
        np.array([depth for depth, _ in asked], dtype=np.int32),
        np.array([token for _, ids in asked for token in ids], dtype=np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    )
