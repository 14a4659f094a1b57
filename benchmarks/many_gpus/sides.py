"""What is compared, as data."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

ASYNCEP = "asyncep"
Length = int | str  # tokens of every request of a cell, or ``mixed``


@dataclass(frozen=True, kw_only=True)
class Side:
    """A strategy on ``gpus`` ranks with experts of this skew; asyncep with a residency and a transport. ``part``: of
    the benchmark that asks for it. ``layers``: how deep the model is. ``sweep_tokens``: the only size of a sweep.
    ``hbm_gib``: the memory that each device may use; None: as the command line says.
    """

    part: str
    strategy: str
    gpus: int
    layers: int
    lengths: tuple[Length, ...] = ()
    skew: float = 1.0
    residency: str | None = None
    transport: str = "copy-engine"
    sweep_tokens: int | None = None
    hbm_gib: float | None = None

    @property
    def name(self) -> str:
        words = [self.strategy, self.residency, self.transport if self.transport != "copy-engine" else None]
        words += [f"{self.hbm_gib:g} GiB" if self.hbm_gib is not None else None]
        return " ".join(word for word in words if word)

    @property
    def owns_requests(self) -> bool:
        """Every rank has requests of its own; otherwise all are given the same ones."""
        return self.strategy == ASYNCEP or self.strategy.startswith("dp+")


@dataclass(frozen=True)
class Setting:
    """What is searched: tokens of a sweep, rows of a chunk, micro-batches of a sweep (pp+pp)."""

    sweep_tokens: int
    chunk_rows: int
    micro_batches: int = 1


def sides_of(
    options: argparse.Namespace, depth: int, resident_layers: int, thresholds: Mapping[str, int]
) -> list[Side]:
    """Everything that ranks compare, part by part, those of most GPUs first. ``depth``: of the model.
    ``resident_layers``: as many as one GPU holds. ``thresholds``: tokens of a sweep of T, by transport.
    """
    whole = Side(part="", strategy=ASYNCEP, gpus=options.gpus, layers=depth, lengths=(_middle(options),))
    parts = {
        "strategies": lambda: _strategies(options, depth),
        "transports": lambda: _transports(options, whole, thresholds),
        "envelope": lambda: _envelope(options, whole),
        "scaling": lambda: _scaling(whole, min(resident_layers, depth)),
    }
    found = [side for part, made in parts.items() if part in options.parts for side in made()]
    return sorted(found, key=lambda side: -side.gpus)


def _middle(options: argparse.Namespace) -> int:
    """The length nearest to 4096, for cells that have one."""
    lengths = [length for length in options.tokens if isinstance(length, int)]
    return min(lengths or options.mixed, key=lambda tokens: abs(tokens - 4096))


def _strategies(options: argparse.Namespace, depth: int) -> Iterator[Side]:
    for skew in options.skews:
        for strategy in options.strategies:
            for residency in options.residencies if strategy == ASYNCEP else [None]:
                yield Side(
                    part="strategies",
                    strategy=strategy,
                    gpus=options.gpus,
                    skew=skew,
                    layers=depth,
                    lengths=tuple(options.tokens),
                    residency=residency,
                    transport=options.transport if residency else "copy-engine",
                )


def _transports(options: argparse.Namespace, whole: Side, thresholds: Mapping[str, int]) -> Iterator[Side]:
    """Copy engines against NCCL in large sweeps, and in sweeps of T tokens."""
    for transport, tokens in thresholds.items():
        side = replace(whole, residency="sharded", transport=transport)
        yield replace(side, part="transports")
        yield replace(side, part="threshold", sweep_tokens=tokens, lengths=(options.threshold_length,))


def _envelope(options: argparse.Namespace, whole: Side) -> Iterator[Side]:
    """A smaller card against the whole one, one GPU and all of them: the plan chooses where banks live."""
    for gpus in dict.fromkeys((whole.gpus, 1)):
        for cap in (options.envelope_gib, None):
            yield replace(whole, part="envelope", gpus=gpus, residency="auto", hbm_gib=cap)


def _scaling(whole: Side, few: int) -> Iterator[Side]:
    """As many layers as one GPU holds, there and sharded over all; the whole model, offloaded there and sharded."""
    for layers in dict.fromkeys((few, whole.layers)):
        alone = "resident" if layers == few else "auto"
        yield replace(whole, part="scaling", layers=layers, residency="sharded")
        yield replace(whole, part="scaling", layers=layers, residency=alone, gpus=1)
