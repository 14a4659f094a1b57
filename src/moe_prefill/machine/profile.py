"""Measured rates of one machine: what the cost model turns FLOPs and bytes into seconds with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import UsageError
from .curve import Curve
from .datasheet import datasheet_peak

FORMAT_VERSION = 1

Precision = Literal["float32", "bfloat16", "float8"]  # float8: of the experts, beside a wider type for the rest
Kind = Literal["gemm", "grouped", "attention", "elementwise"]
Transport = Literal["host", "copy-engine", "nccl", "local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineProfile:
    """One device and its links.

    Rates are FLOP/s, bandwidths bytes/s, by precision or transport. Curves are over these sizes: ``gemm`` rows,
    ``grouped`` rows an expert, ``attention`` tokens of a causal sequence, ``elementwise`` rows: the bytes that all of a
    layer but its products would move if none of it were fused, over what it takes, which may exceed the bandwidth.
    ``layer_overhead_s``: what a layer takes however few rows it has; see ``layer_s``.
    ``transfers`` were measured at banks of ``bank_bytes``; ``host`` is from pinned host memory to the device,
    ``copy-engine`` a pull from one peer, ``nccl`` what arrives at a rank in an all-gather, ``local`` a copy within the
    device, bytes counted once. ``choices`` are kernels and chunk sizes by name, for example ``chunk_rows``.
    """

    gpu: str  # by the name its driver gives, or "cpu"
    driver: str
    torch: str
    date: str  # ISO day
    command: str
    model: str  # whose shapes were measured
    gemm: Mapping[str, Curve]
    grouped: Mapping[str, Curve]
    attention: Mapping[str, Curve]
    elementwise: Mapping[str, Curve]
    memory_bandwidth: float
    layer_overhead_s: float
    transfers: Mapping[str, float]
    bank_bytes: int
    choices: Mapping[str, str | int | float] = field(default_factory=dict)
    is_estimated: bool = False
    version: int = FORMAT_VERSION

    def rates(self, kind: Kind, precision: str) -> Curve:
        """The curve of an operation; in float8 models attention runs in the wider type, and so do projections whose
        float8 rate was not measured.

        UsageError: this precision was not measured.
        """
        curves: Mapping[str, Curve] = getattr(self, kind)
        wanted = precision
        if precision == "float8" and kind in ("gemm", "attention") and precision not in curves:
            wanted = "bfloat16" if "bfloat16" in curves else "float32"
        if wanted not in curves:
            raise UsageError(
                f"the profile of {self.gpu} has no {wanted} rate for {kind}, only {', '.join(curves) or 'none'}; run "
                "moe-prefill calibrate with that --dtype or --quantization"
            )
        return curves[wanted]

    def bandwidth(self, transport: str) -> float:
        """Bytes/s of a transport. UsageError: it was not measured."""
        if transport not in self.transfers:
            raise UsageError(
                f"the profile of {self.gpu} has no bandwidth for {transport}, only "
                f"{', '.join(self.transfers) or 'none'}; run moe-prefill calibrate where that link exists"
            )
        return self.transfers[transport]

    def peak(self, precision: str) -> float:
        """Datasheet FLOP/s, or the best measured product where no datasheet is known (CPUs)."""
        return datasheet_peak(self.gpu, precision) or self.rates("gemm", precision).best

    def layer_s(self, busy_s: float) -> float:
        """Seconds of a layer whose operations take ``busy_s``: a GPU computes while the host launches what comes next,
        so the longer of the two counts; on a CPU both are work of the same cores.
        """
        if self.gpu == "cpu":
            return busy_s + self.layer_overhead_s
        return max(busy_s, self.layer_overhead_s)

    @property
    def chunk_rows(self) -> int:
        """Rows that go through a layer together."""
        return int(self.choices.get("chunk_rows", 2048 if self.gpu == "cpu" else 16384))


def save_profile(profile: MachineProfile, path: str | Path) -> None:
    """Write a profile as JSON."""
    Path(path).write_text(json.dumps(asdict(profile), indent=2) + "\n", encoding="utf-8")


def load_profile(path: str | Path, gpu: str | None = None) -> MachineProfile:
    """Read a profile; ``gpu`` is the device that it is to be used on, by the name its driver gives (or ``cpu``).

    UsageError: it cannot be read, is not a profile, is of another format version, or of another GPU.
    """
    remedy = "make one with moe-prefill calibrate"
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"profile {path}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise UsageError(f"profile {path}: is not JSON ({error}); {remedy}") from error
    if not isinstance(raw, dict) or "version" not in raw:
        raise UsageError(f"profile {path}: is not a machine profile (no field 'version'); {remedy}")
    if raw["version"] != FORMAT_VERSION:
        raise UsageError(
            f"profile {path}: has format version {raw['version']!r}, and this program reads {FORMAT_VERSION}; {remedy}"
        )
    try:
        profile = _from_json(raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"profile {path}: is damaged ({type(error).__name__}: {error}); {remedy}") from error
    if gpu is not None and profile.gpu != gpu:
        raise UsageError(f"profile {path}: was measured on {profile.gpu!r}, and this device is {gpu!r}; {remedy}")
    return profile


_FIELDS = set(MachineProfile.__dataclass_fields__)
_TEXTS = ("gpu", "driver", "torch", "date", "command", "model")
_NUMBERS = ("memory_bandwidth", "layer_overhead_s", "bank_bytes")


def _from_json(raw: dict[str, Any]) -> MachineProfile:
    if set(raw) != _FIELDS:
        raise ValueError(f"fields missing: {sorted(_FIELDS - set(raw))}, unknown: {sorted(set(raw) - _FIELDS)}")
    for name in _TEXTS:
        if not isinstance(raw[name], str):
            raise TypeError(f"{name} is {raw[name]!r}, not a string")
    for name in _NUMBERS:
        _positive(name, raw[name], zero=name != "memory_bandwidth")
    if not isinstance(raw["is_estimated"], bool):
        raise TypeError(f"is_estimated is {raw['is_estimated']!r}, not true or false")
    if "chunk_rows" in raw["choices"]:
        _positive("chunk_rows", raw["choices"]["chunk_rows"])
    for transport, rate in raw["transfers"].items():
        if transport not in get_args(Transport):
            raise ValueError(f"transport {transport!r} is not one of {', '.join(get_args(Transport))}")
        _positive(transport, rate)
    curves = {kind: {p: _curve(c) for p, c in raw[kind].items()} for kind in get_args(Kind)}
    for kind, by_precision in curves.items():
        for precision in by_precision:
            if precision not in get_args(Precision):
                raise ValueError(f"{kind}: precision {precision!r} is not one of {', '.join(get_args(Precision))}")
    return MachineProfile(**{**raw, **curves})


def _curve(raw: dict[str, Any]) -> Curve:
    return Curve(tuple(map(float, raw["sizes"])), tuple(map(float, raw["rates"])))


def _positive(name: str, value: object, *, zero: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not zero):  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
