"""From a device and a model's shapes to a MachineProfile."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date

import torch

from ..core import ModelSpec
from ..costmodel import layer_seconds
from ..machine import Curve, MachineProfile
from ..memory import larger_chunks
from ..residency import bank_bytes
from .operations import LayerBench, curve, layer_batch
from .transfers import measure_transfers

Say = Callable[[str], None]

_MEMORY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}  # of the plain copy: far beyond any cache
_SAME = 0.99  # rates nearer than that are one
_FEW_ROWS = 16  # a layer of so few rows takes its fixed time


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes to measure at: rows of products, tokens of sequences, rows of the chunks that a plan may begin with; and
    about how many seconds for each.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    budget_s: float

    @classmethod
    def of(cls, device: torch.device) -> Grid:
        """What is usual on this kind of device: products up to the largest chunks that a plan grows to."""
        if device.type == "cuda":
            rows = (64, 256, 1024, 4096, 16384, *larger_chunks("cuda", sys.maxsize, 16384))
            lengths, chunks = (128, 512, 2048, 8192, 32768), (8192, 16384, 32768)
            return cls(rows=rows, lengths=lengths, chunks=chunks, budget_s=0.3)
        return cls(rows=(16, 128, 1024, 4096), lengths=(32, 128, 512, 2048, 4096), chunks=(1024, 4096), budget_s=0.1)

    def fitting(self, bench: LayerBench, note: Say) -> Grid:
        """The sizes that leave the device memory, at least the smallest; the others are said."""
        rows, chunks = (tuple(filter(bench.fits, sizes)) or sizes[:1] for sizes in (self.rows, self.chunks))
        left_out = sorted({*self.rows, *self.chunks} - {*rows, *chunks})
        if left_out:
            sizes = ", ".join(f"{size:,}" for size in left_out)
            note(f"{bench.precision}: not measured for want of memory: {sizes} rows")
        return replace(self, rows=rows, chunks=chunks)


def calibrate(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    model: str,
    command: str,
    float8: bool = False,
    grid: Grid | None = None,
    progress: Say = lambda step: None,
    note: Say = lambda line: None,
) -> MachineProfile:
    """Measure this device with one layer of a model in ``dtype``, and with ``float8`` also with its experts in that.
    Takes memory for that layer and three of its banks. ``note`` hears what was left out and what does not add up.

    Chunks, fixed time and transfers are those of the narrowest experts. UsageError: the model has no experts.
    PlanError: host memory for a bank cannot be pinned.
    """
    wanted = grid or Grid.of(device)
    with torch.inference_mode():
        bench = LayerBench(spec, device, dtype, wanted.budget_s)
        grid = wanted.fitting(bench, note)
        profile = _products(bench, grid, progress, model=model, command=command)
        profile = _whole_layers(bench, grid, profile, progress, note)
        if float8:
            bench = LayerBench(spec, device, dtype, wanted.budget_s, float8=True)
            grid = wanted.fitting(bench, note)
            gemm = {bench.precision: _gemm(bench, grid)}
            grouped = {bench.precision: _grouped(bench, grid, progress)}
            profile = replace(
                profile,
                gemm={**profile.gemm, **gemm},
                grouped={**profile.grouped, **grouped},
                choices=_choices(bench, grid, progress),
            )
            profile = _whole_layers(bench, grid, profile, progress, note)
        del bench
    if device.type == "cuda":
        torch.cuda.empty_cache()
    progress("transfers")
    size = bank_bytes(spec, "float8_e4m3fn" if float8 else str(dtype).removeprefix("torch."))
    return replace(profile, bank_bytes=size, transfers=measure_transfers(device, size))


def device_name(device: torch.device) -> str:
    """By which a profile knows a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _products(bench: LayerBench, grid: Grid, progress: Say, *, model: str, command: str) -> MachineProfile:
    """Everything that is measured on its own; the rest is still to be filled."""
    kind = bench.device.type
    progress("matrix products")
    gemm = _gemm(bench, grid)
    grouped = _grouped(bench, grid, progress)
    progress("memory")
    memory = bench.memory(_MEMORY_BYTES[kind])
    profile = MachineProfile(
        gpu=device_name(bench.device),
        driver=_driver() if kind == "cuda" else "",
        torch=torch.__version__,
        date=date.today().isoformat(),
        command=command,
        model=model,
        gemm={bench.precision: gemm},
        grouped={bench.precision: grouped},
        attention={},
        elementwise={},
        memory_bandwidth=memory,
        layer_overhead_s=0.0,
        transfers={},
        bank_bytes=0,
        choices=_choices(bench, grid, progress),
    )
    progress("attention")
    rows = max(grid.rows)
    chunk = rows if kind == "cuda" else profile.chunk_rows  # where a plan grows chunks if it can
    attention = curve([(length, bench.attention(length, rows, chunk)) for length in grid.lengths])
    return replace(profile, attention={bench.precision: attention})


def _gemm(bench: LayerBench, grid: Grid) -> Curve:
    return curve([(rows, bench.gemm(rows)) for rows in grid.rows])


def _grouped(bench: LayerBench, grid: Grid, progress: Say) -> Curve:
    progress(f"{bench.precision} expert products")
    per_expert = bench.spec.top_k / bench.spec.num_experts
    return curve([(rows * per_expert, bench.grouped(rows)) for rows in grid.rows])


def _choices(bench: LayerBench, grid: Grid, progress: Say) -> dict[str, int]:
    progress(f"rows that go through a {bench.precision} layer together")
    return {"chunk_rows": _best_chunk(bench, grid)}


def _whole_layers(bench: LayerBench, grid: Grid, profile: MachineProfile, progress: Say, note: Say) -> MachineProfile:
    """The fixed time of a layer, then what elementwise work reaches beside the products measured alone."""
    precision = bench.precision
    progress(f"whole {precision} layers")
    at_once = {**profile.elementwise, precision: Curve.constant(profile.memory_bandwidth)}
    profile = replace(profile, elementwise=at_once, layer_overhead_s=0.0)
    overhead_s = bench.layer(_FEW_ROWS, profile.chunk_rows)
    if bench.device.type == "cpu":  # see ``MachineProfile.layer_s``
        parts = layer_seconds(bench.spec, 0, layer_batch(_FEW_ROWS), profile, precision)
        overhead_s = max(0.0, overhead_s - sum(parts.values()))
    profile = replace(profile, layer_overhead_s=overhead_s)
    sizes = sorted({*(rows for rows in grid.rows if rows > _FEW_ROWS), profile.chunk_rows})
    fitted = {rows: bench.elementwise(profile, rows) for rows in sizes}
    for rows, (_, too_long) in fitted.items():
        if too_long > 1 - _SAME:
            note(
                f"{precision}: the parts of a layer of {rows:,} rows take {too_long:.0%} longer alone than in it, and "
                "predictions by as much"
            )
    rates = curve([(rows, rate) for rows, (rate, _) in fitted.items()])
    return replace(profile, elementwise={**profile.elementwise, precision: rates})


def _best_chunk(bench: LayerBench, grid: Grid) -> int:
    """The fewest rows at a time whose rate is the best one's, on a batch that all sizes divide."""
    tokens = max(grid.chunks)
    taken_s = {chunk: bench.layer(tokens, chunk) for chunk in sorted(grid.chunks)}
    best = min(taken_s.values())
    return next(chunk for chunk, each in taken_s.items() if _SAME * each <= best)


def _driver() -> str:
    """The NVIDIA driver's version, where its tool is there to say it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout.split("\n")[0].strip() or "unknown"
