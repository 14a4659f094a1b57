"""Transports made slow, unpunctual and hostile, to show what a missing wait would do."""

from __future__ import annotations

import random
import time

import torch

from moe_prefill.experts import Lane, Transport
from moe_prefill.experts.thread_lane import ThreadLane

POISON = 0xFF  # a float of such bytes is NaN, whatever its width


class ThrottledTransport:
    """Brings banks at no more than a set bandwidth."""

    def __init__(self, inner: Transport, bytes_per_s: float) -> None:
        self._inner = inner
        self._bytes_per_s = bytes_per_s

    def fetch(self, layer: int, buffer: torch.Tensor, lane: Lane):
        moved = self._inner.fetch(layer, buffer, lane)
        _delay(lane, buffer.device, buffer.numel() / self._bytes_per_s)
        return moved

    def place(self, layer: int) -> torch.Tensor:
        return self._inner.place(layer)

    def abort(self, reason: str) -> None:
        self._inner.abort(reason)

    def close(self) -> None:
        self._inner.close()


class ChaosTransport(ThrottledTransport):
    """Poisons a buffer as soon as it may be written, then delays the copy, so that reading too early, too late, or
    from the wrong buffer gives NaN.
    """

    def __init__(self, inner: Transport, seed: int, longest_s: float = 0.003) -> None:
        super().__init__(inner, bytes_per_s=float("inf"))
        self._random = random.Random(seed)
        self._longest_s = longest_s

    def fetch(self, layer: int, buffer: torch.Tensor, lane: Lane):
        before, after = self._random.random(), self._random.random()
        lane.run(lambda: buffer.fill_(POISON))
        _delay(lane, buffer.device, before * self._longest_s)
        moved = super().fetch(layer, buffer, lane)
        _delay(lane, buffer.device, after * self._longest_s)
        return moved


class ChaosLane(ThreadLane):
    """A CPU lane whose copies come late, after their target has been poisoned."""

    @classmethod
    def take_over(cls, lane: Lane, seed: int) -> None:
        """Make a lane one of these."""
        assert type(lane) in (ThreadLane, cls), lane
        lane.__class__ = cls
        lane.random = random.Random(seed)

    def copy(self, target, source) -> None:
        self.run(lambda: target.fill_(POISON))
        self.run(lambda: time.sleep(0.002 * self.random.random()))
        super().copy(target, source)


def _delay(lane: Lane, device: torch.device, seconds: float) -> None:
    if device.type == "cuda":
        lane.run(lambda: torch.cuda._sleep(int(seconds * 1.5e9)))  # in cycles of about 1.5 GHz
    else:
        lane.run(lambda: time.sleep(seconds))
