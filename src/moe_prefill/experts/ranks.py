"""Who shares the banks: this process's place among the ranks of a group, and the store by which they meet."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store

from ..errors import WorkerError


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank ``rank`` of ``size``. ``store`` is private to this group in this life of it (a prefix of its own after every
    restart); a rank that is alone needs none.
    """

    rank: int
    size: int
    store: Store | None = None
    timeout_s: float = 300.0  # of meeting the others at start and end

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.rank, self.size)
        assert self.store is not None or self.size == 1, "more than one rank need a store"

    def peers(self) -> list[int]:
        """The other ranks, the next one first, so that no rank is everybody's first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def exchange(self, name: str, mine: bytes) -> list[bytes]:
        """What every rank gives under a name, in order of ranks. WorkerError for ranks that do not come in time."""
        if self.size == 1:
            return [mine]
        assert self.store is not None
        self.store.set(f"{name}/{self.rank}", mine.hex())
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        try:
            self.store.wait(keys, timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise WorkerError(
                f"rank {self.rank} of {self.size} waited {self.timeout_s:g} s for the others at {name!r}: {error}"
            ) from error
        return [bytes.fromhex(self.store.get(key).decode()) for key in keys]

    def meet(self, name: str) -> None:
        """Return when every rank has come here."""
        self.exchange(name, b"here")


ALONE = Ranks(0, 1)
