"""One worker as the router sees it."""

from __future__ import annotations

from .former import WaitingRoom
from .load import Load
from .tables import PrefixTable


class Worker:
    """Its load, its prefixes, and the requests that wait for one of its sweeps."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.alive = True
        self.load = Load()
        self.table = PrefixTable(index)
        self.waiting = WaitingRoom()
