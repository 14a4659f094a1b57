"""The messages themselves."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from ..config import EngineConfig
from ..core import EngineLimits, RankFacts, RunStats, Schedule
from ..forming import Forming
from .packed import PackedChains, PackedEvents, PackedRequests, PackedResults

VERSION = 2  # of the messages: both sides come from one installation, and Hello proves it


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A worker's first message."""

    version: int
    rank: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Build the engine of one of ``size`` ranks. Their common store listens at ``store_port`` of the loopback.
    ``generation`` counts the lives of the group.
    """

    config: EngineConfig
    size: int
    store_port: int
    generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """What is the same for every rank of a group. ``facts``: what routing needs to know of a rank."""

    limits: EngineLimits
    forming: Forming
    schedule: Schedule
    plan_digest: str
    peak_flops: float | None
    facts: RankFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine is built. ``layer_s``: predicted seconds of one layer of a full sweep."""

    plan: EnginePlan
    layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Compute one sweep, possibly of no requests; ``number`` is its own, or its round's. ``chains``: for the worker's
    KV pool, if it has one and somebody routes.
    """

    number: int
    requests: PackedRequests
    chains: PackedChains | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The results of one sweep, in the order of its requests, the work that they took, and what it changed in the
    worker's KV pool.
    """

    number: int
    results: PackedResults
    stats: RunStats
    events: PackedEvents | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Say what the KV pool holds. Sent to workers that have nothing to compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """A snapshot of the KV pool."""

    events: PackedEvents


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The worker ends. ``code`` is the name of a class in ``errors``, or of any other exception."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Finish: nothing else will be asked."""


Message = Hello | Start | Ready | Score | Scored | Audit | PoolState | Failure | Shutdown
TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Message)}
