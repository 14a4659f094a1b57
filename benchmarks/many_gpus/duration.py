"""How long a call should take: what is predicted, run as often as it will be, and what comes before it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from .forecasts import Forecast, Forecaster
from .measuring import enough
from .requests import counts_of
from .sides import Length, Side

# Assumed until a call has said otherwise, in seconds: the first start of everything, kernels compiled; rates measured;
# processes of one number of GPUs; a peer's start and its compilation (60 to 100 s on one GPU, and as much again).
_START_S, _CALIBRATE_S, _SPAWN_S, _PEER_START_S = 60.0, 45.0, 20.0, 150.0
_LOAD_BYTES_PER_S = 10e9  # dummy weights, a GPU
_HOST_GIB_PER_S = 2.7  # memory that is touched for the first time, where a host's grows as it is used
_PEER_RUNS = 6  # two to warm up, then five, or fewer where they are long


def call_s(
    options: argparse.Namespace,
    forecaster: Forecaster,
    sides: Mapping[tuple[Side, Length], Forecast],
    tiers: Sequence[dict[str, Any]],
    peers: Sequence[dict[str, Any]],
) -> float:
    """Seconds that the call with these options should take."""
    load_s = forecaster.weight_bytes / _LOAD_BYTES_PER_S
    calibrate_s = 0.0 if options.profile or options.estimated else _CALIBRATE_S
    seconds = _START_S + calibrate_s + _SPAWN_S * len({side.gpus for side, _ in sides})
    for side, host_gib in {side: found.cell.get("host_gib", 0.0) for (side, _), found in sides.items()}.items():
        seconds += host_gib / _HOST_GIB_PER_S
        seconds += load_s * side.layers / forecaster.spec.num_layers / (side.gpus if side.gpus > 1 else 1)
    for (side, length), forecast in sides.items():
        if forecast.best_first:
            once = _run_tokens(options, side, length) / forecast.cell["predicted_tokens_per_s"]
            seconds += _runs(options, len(forecast.best_first), once) * once
    for cell in tiers:
        if "predicted_tokens_per_s" in cell:
            once = cell["prompt_tokens"] / cell["predicted_tokens_per_s"]
            seconds += _SPAWN_S + load_s / options.gpus + (options.least_runs + 1) * once
    for cell in peers:
        if "predicted_peer_tokens_per_s" in cell:
            once = 2 * options.run_tokens * options.gpus / cell["predicted_peer_tokens_per_s"]
            seconds += min(_PEER_RUNS, 2 + max(2.0, 15.0 / once)) * once
    budgets = len(options.peer_batched_tokens)
    return seconds + len({cell["peer_strategy"] for cell in peers}) * budgets * (_PEER_START_S + load_s / options.gpus)


def _runs(options: argparse.Namespace, settings: int, once_s: float) -> float:
    """Search, one or two runs to warm up, those that are timed, and a part of one that counts experts' loads."""
    tried, timed = min(options.search, settings), [once_s]
    while not enough(options, timed):
        timed.append(once_s)
    return (2 * tried if tried > 1 else 0) + 1 + min(1, options.warm_up) + len(timed) + 0.15


def _run_tokens(options: argparse.Namespace, side: Side, length: Length) -> int:
    return sum(tokens * count for tokens, count in counts_of(options, side, length))
