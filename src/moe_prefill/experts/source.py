"""Bank sources: what makes the bank of a layer complete in this device's memory before the layer needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

Bank = TypeVar("Bank", covariant=True)


class BankSource(Protocol[Bank]):
    """Hands a sweep its banks in order of layers.

    Between ``acquire(layer)`` and ``release(layer)`` the bank's bytes stay valid for work enqueued on the current
    stream. ``begin_sweep`` and ``end_sweep`` bracket one pass over all layers, so that a source can fetch ahead.
    """

    def begin_sweep(self) -> None: ...

    def acquire(self, layer: int) -> Bank | None:
        """The complete bank of a layer; None for a dense one."""
        ...

    def release(self, layer: int) -> None: ...

    def end_sweep(self) -> None: ...


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
