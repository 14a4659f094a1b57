"""Bank sources: what makes the bank of a layer complete in this device's memory before the layer needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from .stats import TransferStats

Bank = TypeVar("Bank", covariant=True)


class BankSource(Protocol[Bank]):
    """Hands a sweep its banks in order of layers.

    Between ``acquire(layer)`` and ``release(layer)`` the bank's bytes stay valid for work enqueued on the current
    stream. ``begin_sweep`` and ``end_sweep`` bracket one pass over all layers, so that a source can fetch ahead.
    """

    def begin_sweep(self) -> None: ...

    def acquire(self, layer: int) -> Bank | None:
        """The complete bank of a layer; None for a dense one. WorkerError where a peer cannot bring its part."""
        ...

    def release(self, layer: int) -> None: ...

    def end_sweep(self) -> None: ...

    def take_stats(self) -> list[TransferStats]:
        """What the sweeps finished since the last call have cost, oldest first; never waits."""
        ...

    def abort(self, reason: str) -> None:
        """Let go of every wait for another rank; callable from any thread. Only ``close`` may follow."""
        ...

    def close(self) -> None:
        """Give the banks' memory back; no sweep is under way any more."""
        ...


class ResidentBanks(BankSource[Bank]):
    """Every bank whole in the device's memory: nothing moves."""

    def __init__(self, banks: Sequence[Bank | None]) -> None:
        self._banks = tuple(banks)

    def begin_sweep(self) -> None:
        pass

    def acquire(self, layer: int) -> Bank | None:
        return self._banks[layer]

    def release(self, layer: int) -> None:
        pass

    def end_sweep(self) -> None:
        pass

    def take_stats(self) -> list[TransferStats]:
        return []

    def abort(self, reason: str) -> None:
        pass

    def close(self) -> None:
        self._banks = ()
