"""The saturation threshold T: how much work a sweep needs so that streaming its banks costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core import ModelSpec
from ..errors import PlanError
from ..machine import MachineProfile
from .batch import Batch
from .flops import batch_flops
from .predict import predict_sweep
from .streaming import RESIDENT, BankCopy, Streaming, bank_copies

_MOST_TOKENS = 1 << 36
_PLATEAU = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Banks ``first_layer`` to ``last_layer`` on ``link``: they take ``copy_s``, and may come while ``compute_s`` of
    computing goes on. ``last_layer`` < ``first_layer``: the window runs into the next sweep.
    """

    first_layer: int
    last_layer: int
    link: str
    copy_s: float
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """``flops``: T, of one sweep over all layers, after sharing. ``tokens``: of the sweep that reaches it.

    ``t_paper``: the paper's equation (slowest transfer of a layer x datasheet rate x gamma) times the number of
    layers, FLOPs; 0 where nothing streams. ``window``: the one that decides, at T without gamma; None where nothing
    streams, and T is the sweep at which tokens/s reach 95% of their plateau.
    """

    flops: int
    tokens: int
    t_paper: int
    window: Window | None


def saturation(
    spec: ModelSpec,
    profile: MachineProfile,
    *,
    precision: str,
    streaming: Streaming = RESIDENT,
    tokens_per_request: int = 1024,
    gamma: float = 1.2,
    prune_last: bool = True,
) -> Saturation:
    """T as ``gamma`` times the least sweep of requests of ``tokens_per_request`` tokens whose predicted compute hides
    every streamed bank, window by window, at the rates of that sweep.

    PlanError: no sweep hides them, for instance with one buffer and streamed layers side by side.
    """
    copies, depth = bank_copies(profile, streaming), streaming.depth

    def batch(tokens: int) -> Batch:
        return Batch.uniform(tokens, tokens_per_request, prune_last=prune_last)

    def flops(tokens: int) -> int:
        return batch_flops(spec, batch(tokens))

    def seconds(tokens: int) -> tuple[tuple[float, ...], float]:
        prediction = predict_sweep(spec, batch(tokens), profile, precision=precision)
        return prediction.layer_s, prediction.head_s

    if not copies:
        tokens = _plateau(lambda tokens: sum(seconds(tokens)[0]) + seconds(tokens)[1], tokens_per_request)
        return Saturation(flops=flops(tokens), tokens=tokens, t_paper=0, window=None)

    def tightest(tokens: int) -> Window:
        return tightest_window(*seconds(tokens), copies, depth)

    least = _least(lambda tokens: _hides(tightest(tokens)))
    if least is None:
        worst = tightest(_MOST_TOKENS)
        raise PlanError(
            f"no sweep hides the banks of layers {worst.first_layer} to {worst.last_layer} ({worst.copy_s:.3g} s over "
            f"{worst.link}) with {depth} bank buffer{'s' * (depth != 1)}; give a larger --prefetch-depth"
        )
    target = math.ceil(gamma * flops(least))
    reached = _least(lambda tokens: flops(tokens) >= target)
    assert reached is not None, (target, least)
    slowest = max(copy.seconds for copy in copies)
    paper = math.ceil(gamma * slowest * profile.peak(precision) * spec.num_layers)
    return Saturation(flops=target, tokens=reached, t_paper=paper, window=tightest(least))


def tightest_window(layer_s: Sequence[float], tail_s: float, copies: Sequence[BankCopy], depth: int) -> Window:
    """The run of consecutive banks on one link whose copies have the least room, relative to their time.

    In the steady state a run's first copy can begin when its buffer is free (after the layer ``depth`` banks before
    it), and its last must end before its layer begins. Nothing is exposed exactly where every run fits, and runs longer
    than a sweep fit where the shorter ones and a whole sweep do.
    """
    count = len(copies)
    ends = np.cumsum(layer_s)
    cycle = float(ends[-1]) + tail_s
    layers = np.asarray([copy.layer for copy in copies])

    def sweep(banks: np.ndarray) -> np.ndarray:
        return banks // count * cycle

    first = np.arange(count)[:, None]
    last = first + np.arange(count)
    free = sweep(first - depth) + ends[layers[(first - depth) % count]]
    needed = sweep(last) + (ends - np.asarray(layer_s))[layers[last % count]]
    room = needed - free
    found = []
    for link in dict.fromkeys(copy.link for copy in copies):
        cost = np.asarray([copy.seconds if copy.link == link else 0.0 for copy in copies])
        taken = np.cumsum(cost[last % count], axis=1)
        with np.errstate(divide="ignore"):
            load = np.where(taken > 0, taken / np.maximum(room, 1e-15), 0.0)
        i, j = np.unravel_index(int(load.argmax()), load.shape)
        found.append(_window(copies, int(i), int(last[i, j]), link, float(taken[i, j]), float(room[i, j])))
        found.append(_window(copies, 0, count - 1, link, float(cost.sum()), cycle))
    return max(found, key=_load)


def _window(copies: Sequence[BankCopy], first: int, last: int, link: str, copy_s: float, compute_s: float) -> Window:
    return Window(
        first_layer=copies[first].layer,
        last_layer=copies[last % len(copies)].layer,
        link=link,
        copy_s=copy_s,
        compute_s=compute_s,
    )


def _load(window: Window) -> float:
    return window.copy_s / max(window.compute_s, 1e-15)


def _hides(window: Window) -> bool:
    return window.copy_s <= window.compute_s


def _plateau(seconds: Callable[[int], float], tokens_per_request: int) -> int:
    """Tokens of the least sweep of whole requests that runs at 95% of the rate of an endless one."""

    def rate(requests: int) -> float:
        return requests * tokens_per_request / seconds(requests * tokens_per_request)

    best = rate(_MOST_TOKENS // tokens_per_request)
    requests = _least(lambda requests: rate(requests) >= _PLATEAU * best, _MOST_TOKENS // tokens_per_request)
    assert requests is not None, best
    return requests * tokens_per_request


def _least(holds: Callable[[int], bool], most: int = _MOST_TOKENS) -> int | None:
    """The least positive number for which a condition holds that stays true from there on; None beyond ``most``."""
    high = 1
    while not holds(high):
        if high >= most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
