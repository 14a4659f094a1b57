"""What a worker tells the router of its pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .hashes import Digest

ChangeKind = Literal["stored", "used", "evicted"]


@dataclass(frozen=True, slots=True)
class BlockChange:
    """``stored``: new blocks, least recent first. ``used``: these became the most recent, in this order. ``evicted``:
    these are gone.
    """

    kind: ChangeKind
    digests: tuple[Digest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEvents:
    """Changes in the order in which they happened. ``generation`` counts the lives of the worker; ``number`` counts
    its messages from 0 within a life. A ``snapshot`` lists the whole pool as one ``stored`` change and replaces what
    the router believes.
    """

    worker: int
    generation: int
    number: int
    changes: tuple[BlockChange, ...]
    snapshot: bool = False
