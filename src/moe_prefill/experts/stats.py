"""What streaming cost a sweep: bytes by link and layer, when copies ran, and how long the computation waited."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from .lanes import Mark


@dataclass(frozen=True, slots=True)
class Fetch:
    """One bank on its way: ``bytes_by_link`` is what was moved for it, marks say when."""

    layer: int
    begin: Mark
    ready: Mark
    bytes_by_link: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LayerTransfer:
    """A layer of one sweep. Times in ms since the sweep began; a copy that ran before it began has negative ones.

    ``wait_ms`` is how long the compute side waited for the bank. A resident or dense layer has no copy.
    """

    layer: int
    wait_ms: float
    compute_begin_ms: float
    compute_end_ms: float
    copy_begin_ms: float | None
    copy_end_ms: float | None
    bytes_by_link: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TransferStats:
    """One sweep. ``begin_ms``: since the first sweep of all began. ``exposed_ms``: all its waiting;
    ``exposed_first_ms``: that for its first streamed bank alone, part of it.
    """

    begin_ms: float
    sweep_ms: float
    exposed_ms: float
    exposed_first_ms: float
    bytes_by_link: Mapping[str, int]
    layers: tuple[LayerTransfer, ...]


@dataclass(slots=True)
class _Layer:
    layer: int
    wait_begin: Mark
    begin: Mark
    fetch: Fetch | None
    end: Mark | None = None


@dataclass(slots=True)
class _Sweep:
    begin: Mark
    layers: list[_Layer] = field(default_factory=list)
    end: Mark | None = None


class SweepRecorder:
    """Keeps the marks of sweeps until they are done; reading them never waits."""

    def __init__(self, keep: int = 64) -> None:
        self._sweeps: deque[_Sweep] = deque(maxlen=keep)  # bounded: a reader may never come
        self._origin: Mark | None = None

    def begin(self, now: Mark) -> None:
        if self._sweeps and self._sweeps[-1].end is None:
            self._sweeps.pop()  # an error ended it early
        self._origin = self._origin or now
        self._sweeps.append(_Sweep(now))

    def acquired(self, layer: int, asked: Mark, got: Mark, fetch: Fetch | None) -> None:
        self._sweeps[-1].layers.append(_Layer(layer, asked, got, fetch))

    def released(self, now: Mark) -> None:
        self._sweeps[-1].layers[-1].end = now

    def end(self, now: Mark) -> None:
        self._sweeps[-1].end = now

    def take(self) -> list[TransferStats]:
        """The finished sweeps that were not taken yet, oldest first."""
        taken = []
        while self._sweeps and (end := self._sweeps[0].end) is not None and end.is_done():
            sweep = self._sweeps.popleft()
            assert self._origin is not None
            taken.append(_stats(sweep, end, sweep.begin.ms_since(self._origin)))
        return taken


def _stats(sweep: _Sweep, end: Mark, begin_ms: float) -> TransferStats:
    layers = tuple(_layer_stats(layer, sweep.begin) for layer in sweep.layers)
    waits = [layer.wait_ms for layer in layers if layer.bytes_by_link]
    total: Counter[str] = Counter()
    for layer in layers:
        total.update(layer.bytes_by_link)
    first = waits[0] if waits else 0.0
    return TransferStats(begin_ms, end.ms_since(sweep.begin), sum(waits), first, dict(total), layers)


def _layer_stats(layer: _Layer, begin: Mark) -> LayerTransfer:
    assert layer.end is not None, layer
    fetch = layer.fetch
    return LayerTransfer(
        layer=layer.layer,
        wait_ms=layer.begin.ms_since(layer.wait_begin),
        compute_begin_ms=layer.begin.ms_since(begin),
        compute_end_ms=layer.end.ms_since(begin),
        copy_begin_ms=None if fetch is None else fetch.begin.ms_since(begin),
        copy_end_ms=None if fetch is None else fetch.ready.ms_since(begin),
        bytes_by_link={} if fetch is None else fetch.bytes_by_link,
    )
