"""Settings of the engine: frozen, composed, strict. Command-line defaults are read from these fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

from .errors import UsageError

Sharing = Literal["auto", "off", "force"]
Strategy = Literal["asyncep", "dp+ep", "dp+tp", "tp+ep", "tp+tp", "pp+pp"]
SIZES = ("max_sweep_tokens", "chunk_rows")  # what the last bits of answers depend on, and free memory decides
_KINDS: dict[str, type] = {"str": str, "bool": bool, "int": Integral, "float": Real}  # numpy's numbers, too


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to build an engine. ``None`` means: decided by the memory plan or the machine.

    ``model`` is a local directory, a hub id (``revision``: its branch, tag or commit), or, with
    ``load_format="dummy"``, the name of a preset. ``sharing`` is ``auto`` (share a prefix where it pays), ``off``, or
    ``force`` (every common token once, for tests).
    ``gpus`` is the number of worker processes, one a GPU (or a share of the CPU each; with ``device="cuda:I"`` all on
    that GPU); None: no process but this one. ``threads`` are those of each process.
    ``quantization="fp8"`` keeps linear maps and experts in float8, quantised while loading; a checkpoint that is in
    float8 stays so without it.
    ``memory_gib`` bounds each device's memory, ``host_gib`` the host's. ``residency`` pins where banks live (see
    ``residency.parse_residency``), ``prefetch_depth`` how many fill ahead, ``transport`` how GPUs get each other's
    parts of sharded banks; ``chunk_rows`` how many rows go through a layer at a time; ``profile`` is a file of rates
    that ``moe-prefill calibrate`` measured here, by which the plan chooses. ``trace``: a file for a Chrome trace of
    copies and compute. ``check_finite``: refuse weights that are not finite, and find what first gives NaN or infinity.
    ``strategy``: how several GPUs share a model; all but ``asyncep`` are there for comparison.
    ``kv_gib``: memory of each device in which K and V of prefixes outlive their sweep; 0: none; None: none, or with
    ``keep_prefixes`` (requests keep coming) what the memory plan has for it.
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    gpus: int | None = None
    dtype: str = "auto"
    quantization: Literal["fp8"] | None = None
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    seed: int = 0
    dummy_skew: float | None = None
    num_layers: int | None = None  # dummy weights only: a model of reduced depth
    sharing: Sharing = "auto"
    prune_last: bool = True  # the last layer computes only what is read; False for measurements
    max_sweep_tokens: int | None = None
    memory_gib: float | None = None
    host_gib: float | None = None
    threads: int | None = None
    residency: str | None = None
    prefetch_depth: int | None = None
    transport: Literal["copy-engine", "nccl"] = "copy-engine"
    chunk_rows: int | None = None
    profile: str | None = None
    trace: str | None = None
    check_finite: bool = False
    kv_gib: float | None = None
    keep_prefixes: bool = False
    strategy: Strategy = "asyncep"
    micro_batches: int = 4  # pp+pp: a sweep's

    def __post_init__(self) -> None:
        self._check_types()
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16")),
            ("quantization", (None, "fp8")),
            ("load_format", ("safetensors", "dummy")),
            ("sharing", ("auto", "off", "force")),
            ("strategy", get_args(Strategy)),
            ("transport", ("copy-engine", "nccl")),
        ):
            if getattr(self, name) not in allowed:
                said = f"is {getattr(self, name)!r}; it must be one of {', '.join(map(str, allowed))}"
                raise UsageError.about(name, said)
        for name in (
            "max_sweep_tokens",
            "memory_gib",
            "host_gib",
            "threads",
            "gpus",
            "num_layers",
            "prefetch_depth",
            "chunk_rows",
            "micro_batches",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError.about(name, f"is {value}; it must be positive" + " and finite" * (value > 0))
        if self.kv_gib is not None and not 0 <= self.kv_gib < math.inf:
            raise UsageError.about("kv_gib", f"is {self.kv_gib}; it must be 0 (keep no prefixes) or more, and finite")
        if self.check_finite and self.strategy != "asyncep":
            said = f"looks into asyncep only, not {self.strategy}; leave one of the two out"
            raise UsageError.about("check_finite", said)
        if self.kv_gib and self.strategy != "asyncep":
            said = f"is {self.kv_gib:g}; strategy {self.strategy} keeps no prefixes, give 0"
            raise UsageError.about("kv_gib", said)

    def _check_types(self) -> None:
        """Raise UsageError for a value that is not of its field's kind: from Python anything may come."""
        for field in fields(self):
            value, name = getattr(self, field.name), str(field.type).removesuffix(" | None")
            kind = _KINDS.get(name)
            if kind is None or (value is None and str(field.type).endswith(" | None")):
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UsageError.about(field.name, f"is {value!r}; it must be of type {name}")


def given_sizes(config: EngineConfig) -> dict[str, int]:
    """The sizes that are settings, and not the plan's to choose."""
    return {name: size for name in SIZES if (size := getattr(config, name)) is not None}


def with_recorded_sizes(config: EngineConfig, recorded: Callable[[str], object]) -> EngineConfig:
    """The settings of a job that is gone on with: sizes that are not given are those that it began with, since the plan
    may find other free memory today. ``recorded`` gives such a size by its name, if it knows it.
    """
    kept = {name: size for name in SIZES if isinstance(size := recorded(name), int)}
    sizes: dict[str, Any] = {**kept, **given_sizes(config)}
    return replace(config, **sizes)
