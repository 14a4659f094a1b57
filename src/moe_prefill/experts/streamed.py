"""Banks that arrive just in time: a ring of buffers, filled ahead of the layers that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..errors import WorkerError
from .lanes import Lane, Mark
from .source import Bank, BankSource
from .stats import Fetch, SweepRecorder, TransferStats
from .transport import Transport

Held = TypeVar("Held")


@dataclass(slots=True)
class _Slot(Generic[Held]):
    """A buffer of the ring: the bank it holds or will hold, and when its last reader is through."""

    buffer: torch.Tensor
    bank: Held
    free: Mark
    fetch: Fetch | None = None


class StreamedBanks(BankSource[Bank]):
    """Streamed layers come through a ring of buffers, the others are resident.

    Fetch n brings the n-th streamed layer, counted round and round over all sweeps, into buffer n modulo their number,
    as soon as that buffer's last reader is through. So the first banks of the next sweep are fetched during the last
    layers of this one, and wait there however long it takes to come.
    """

    def __init__(
        self,
        resident: Sequence[Bank | None],
        transports: Mapping[int, Transport],
        buffers: Sequence[torch.Tensor],
        make_bank: Callable[[torch.Tensor], Bank],
        lane: Lane,
    ) -> None:
        """``resident``: an entry a layer, None for a dense or streamed one. ``transports``: what brings each streamed
        layer, in order of layers. ``buffers``: uint8 [bank bytes] each; ``make_bank`` gives such a buffer the form
        that the mathematics reads.
        """
        assert not transports or buffers, "streamed layers need at least one buffer"
        assert list(transports) == sorted(transports), list(transports)
        assert all(resident[layer] is None for layer in transports)
        self._resident = tuple(resident)
        self._order = tuple(transports)
        self._transports = dict(transports)
        loaded = lane.compute_mark()  # also behind whatever used the buffers' memory before
        self._slots = [_Slot(buffer, make_bank(buffer), free=loaded) for buffer in buffers]
        self._lane = lane
        self._recorder = SweepRecorder()
        self._fetched = self._released = 0  # of all streamed banks, over all sweeps
        self._aborted: str | None = None

    def begin_sweep(self) -> None:
        self._finish_interrupted_sweep()
        self._recorder.begin(self._lane.compute_mark())
        self._fetch_ahead()

    def acquire(self, layer: int) -> Bank | None:
        if layer not in self._transports:
            now = self._lane.compute_mark()
            self._recorder.acquired(layer, now, now, None)
            return self._resident[layer]
        slot = self._next_slot()
        assert slot.fetch is not None
        assert slot.fetch.layer == layer, (slot.fetch, layer)
        asked, got = self._wait(slot.fetch.ready)
        self._recorder.acquired(layer, asked, got, slot.fetch)
        return slot.bank

    def release(self, layer: int) -> None:
        now = self._lane.compute_mark()
        self._recorder.released(now)
        if layer in self._transports:
            self._next_slot().free = now
            self._released += 1
            self._fetch_ahead()

    def end_sweep(self) -> None:
        assert self._position == 0, f"a sweep ended after {self._position} of {len(self._order)} streamed layers"
        self._recorder.end(self._lane.compute_mark())

    def take_stats(self) -> list[TransferStats]:
        return self._recorder.take()

    def abort(self, reason: str) -> None:
        self._aborted = self._aborted or reason
        for transport in self._distinct_transports():
            transport.abort(reason)

    def close(self) -> None:
        self._lane.close()
        for transport in self._distinct_transports():
            transport.close()
        self._slots.clear()
        self._transports.clear()
        self._resident = ()

    def _wait(self, ready: Mark) -> tuple[Mark, Mark]:
        """Wait for a bank. A source that lost a peer is of no more use: it lets go of all waits, so that it can be
        closed.
        """
        try:
            marks = self._lane.compute_wait(ready)
        except WorkerError as error:
            self.abort(str(error))
            raise
        if self._aborted is not None:
            raise WorkerError(self._aborted)
        return marks

    def _distinct_transports(self) -> list[Transport]:
        return list(dict.fromkeys(self._transports.values()))

    @property
    def _position(self) -> int:
        """How many streamed layers of the present sweep are behind."""
        return self._released % len(self._order) if self._order else 0

    def _next_slot(self) -> _Slot[Bank]:
        return self._slots[self._released % len(self._slots)]

    def _fetch_ahead(self) -> None:
        while self._order and self._fetched < self._released + len(self._slots):
            self._fetch_next()

    def _fetch_next(self) -> None:
        layer = self._order[self._fetched % len(self._order)]
        slot = self._slots[self._fetched % len(self._slots)]
        self._lane.wait(slot.free)
        begin = self._lane.mark()
        moved = self._transports[layer].fetch(layer, slot.buffer, self._lane)
        slot.fetch = Fetch(layer, begin, self._lane.mark(), moved)
        self._fetched += 1

    def _finish_interrupted_sweep(self) -> None:
        """Pass over the layers that an error kept from being computed: the ring goes on where the next sweep begins."""
        while self._position:
            layer = self._order[self._position]
            self.acquire(layer)
            self.release(layer)
