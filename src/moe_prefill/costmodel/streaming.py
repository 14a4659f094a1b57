"""When banks arrive: the copies that a sweep needs, and the waiting that they leave exposed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..core import Level
from ..machine import MachineProfile

Peer = Literal["copy-engine", "nccl"]  # how shards come from other ranks

_MAX_SWEEPS = 256  # until the waiting of a sweep repeats; it does after a few unless a link is all but saturated


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How banks come to one of ``ranks`` ranks. ``levels`` has one entry a layer (None: dense), or is empty: every bank
    is resident. ``bank_bytes``: of one layer's whole bank. ``depth``: bank buffers. ``peer``: how shards come from the
    other ranks.
    """

    levels: tuple[Level | None, ...] = ()
    bank_bytes: int = 0
    depth: int = 1
    ranks: int = 1
    peer: Peer = "copy-engine"


RESIDENT = Streaming()


@dataclass(frozen=True, slots=True)
class BankCopy:
    """What brings the bank of ``layer``: ``seconds`` on ``link``, which carries one copy at a time."""

    layer: int
    link: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Exposure:
    """Seconds that a sweep waits for banks: in the steady state, and the first sweep of all, which finds nothing."""

    steady_s: float
    first_s: float


def bank_copies(profile: MachineProfile, streaming: Streaming) -> tuple[BankCopy, ...]:
    """The copies of a sweep on one rank, by layer.

    ``sharded`` pulls (N-1)/N of a bank from the peers, ``offloaded`` brings all of it from the host. ``hybrid`` brings
    1/N from the host, ahead of everything, while (N-1)/N come from the peers: it takes the link that needs longer.
    UsageError: the profile has no bandwidth for a link that is needed.
    """
    copies = []
    bank_bytes, ranks, peer = streaming.bank_bytes, streaming.ranks, streaming.peer
    for layer, level in enumerate(streaming.levels):
        if level in (None, "resident"):
            continue
        pull = (ranks - 1) * bank_bytes / ranks / profile.bandwidth(peer) if level != "offloaded" and ranks > 1 else 0.0
        host = 0.0
        if level != "sharded":
            host = bank_bytes / (1 if level == "offloaded" else ranks) / profile.bandwidth("host")
        if max(pull, host) > 0:
            copies.append(BankCopy(layer, peer if pull >= host else "host", max(pull, host)))
    return tuple(copies)


def exposure(layer_s: Sequence[float], tail_s: float, copies: Sequence[BankCopy], depth: int) -> Exposure:
    """Simulate sweeps, one behind the other.

    ``layer_s``: compute seconds of each layer, ``tail_s``: after the last one. ``depth`` buffers take turns: a copy
    begins when its link is free and the layer that last used its buffer is done, whatever sweep that was.
    """
    assert depth >= 1, depth
    if not copies:
        return Exposure(0.0, 0.0)
    load_s = {link: sum(copy.seconds for copy in copies if copy.link == link) for link in {c.link for c in copies}}
    sweeps = _Sweeps(layer_s, tail_s, copies, depth)
    waits = [sweeps.next() for _ in range(2 * depth)]
    # A sweep may wait differently from the next when depth does not divide the banks: buffers repeat every depth.
    while len(waits) < _MAX_SWEEPS and not _repeats(waits, depth, sweeps.clock):
        waits += [sweeps.next() for _ in range(depth)]
    # A link that is busy a little longer than a sweep computes falls behind only slowly; in the end all wait for it.
    behind_s = max(load_s.values()) - sum(layer_s) - tail_s
    return Exposure(max(behind_s, sum(waits[-depth:]) / depth), waits[0])


def _repeats(waits: list[float], depth: int, clock: float) -> bool:
    last, before = sum(waits[-depth:]), sum(waits[-2 * depth : -depth])
    return abs(last - before) <= 1e-12 * clock


class _Sweeps:
    """Time of day on the compute stream and on each link."""

    def __init__(self, layer_s: Sequence[float], tail_s: float, copies: Sequence[BankCopy], depth: int) -> None:
        self.clock = 0.0
        self._layer_s, self._tail_s = layer_s, tail_s
        self._copies = {copy.layer: copy for copy in copies}
        self._link_free = {copy.link: 0.0 for copy in copies}
        self._buffer_free = deque([0.0] * depth)  # in the order in which copies take them

    def next(self) -> float:
        """One more sweep; the seconds that it waited."""
        waited = 0.0
        for layer, compute_s in enumerate(self._layer_s):
            copy = self._copies.get(layer)
            if copy is not None:
                arrives = max(self._link_free[copy.link], self._buffer_free.popleft()) + copy.seconds
                self._link_free[copy.link] = arrives
                waited += max(0.0, arrives - self.clock)
                self.clock = max(self.clock, arrives)
            self.clock += compute_s
            if copy is not None:
                self._buffer_free.append(self.clock)
        self.clock += self._tail_s
        return waited
