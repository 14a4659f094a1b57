"""From a device and a model's shapes to a MachineProfile."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date

import torch

from ..core import ModelSpec
from ..costmodel import layer_seconds
from ..machine import Curve, MachineProfile
from ..residency import bank_bytes
from .operations import LayerBench, curve, layer_batch
from .transfers import measure_transfers

Progress = Callable[[str], None]

_MEMORY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}  # of the plain copy: far beyond any cache
_SAME = 0.99  # rates nearer than that are one
_FEW_ROWS = 16  # a layer of so few rows takes its fixed time


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes to measure at: rows of products, tokens of sequences, rows that may go through a layer together; and
    about how many seconds for each.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    budget_s: float

    @classmethod
    def of(cls, device: torch.device) -> Grid:
        """What is usual on this kind of device."""
        if device.type == "cuda":
            rows, chunks = (64, 256, 1024, 4096, 16384, 32768), (8192, 16384, 32768)
            return cls(rows=rows, lengths=(128, 512, 2048, 8192, 32768), chunks=chunks, budget_s=0.3)
        return cls(rows=(16, 128, 1024, 4096), lengths=(32, 128, 512, 2048, 4096), chunks=(1024, 4096), budget_s=0.1)


def calibrate(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    model: str,
    command: str,
    float8: bool = False,
    grid: Grid | None = None,
    progress: Progress = lambda step: None,
) -> MachineProfile:
    """Measure this device with one layer of a model in ``dtype``, and with ``float8`` also with its experts in that.
    Takes memory for that layer and three of its banks.

    Chunks, fixed time and transfers are those of the narrowest experts. UsageError: the model has no experts.
    PlanError: host memory for a bank cannot be pinned.
    """
    grid = grid or Grid.of(device)
    with torch.inference_mode():
        bench = LayerBench(spec, device, dtype, grid.budget_s)
        profile = _products(bench, grid, progress, model=model, command=command)
        profile = _whole_layers(bench, grid, profile, progress)
        if float8:
            bench = LayerBench(spec, device, dtype, grid.budget_s, float8=True)
            gemm = {bench.precision: _gemm(bench, grid)}
            grouped = {bench.precision: _grouped(bench, grid, progress)}
            profile = replace(profile, gemm={**profile.gemm, **gemm}, grouped={**profile.grouped, **grouped})
            profile = _whole_layers(bench, grid, profile, progress)
        del bench
    if device.type == "cuda":
        torch.cuda.empty_cache()
    progress("transfers")
    size = bank_bytes(spec, "float8_e4m3fn" if float8 else str(dtype).removeprefix("torch."))
    return replace(profile, bank_bytes=size, transfers=measure_transfers(device, size))


def device_name(device: torch.device) -> str:
    """By which a profile knows a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _products(bench: LayerBench, grid: Grid, progress: Progress, *, model: str, command: str) -> MachineProfile:
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
    )
    progress("attention")
    rows, chunk = max(grid.rows), profile.chunk_rows
    attention = curve([(length, bench.attention(length, rows, chunk)) for length in grid.lengths])
    return replace(profile, attention={bench.precision: attention})


def _gemm(bench: LayerBench, grid: Grid) -> Curve:
    return curve([(rows, bench.gemm(rows)) for rows in grid.rows])


def _grouped(bench: LayerBench, grid: Grid, progress: Progress) -> Curve:
    progress(f"{bench.precision} expert products")
    per_expert = bench.spec.top_k / bench.spec.num_experts
    return curve([(rows * per_expert, bench.grouped(rows)) for rows in grid.rows])


def _whole_layers(bench: LayerBench, grid: Grid, profile: MachineProfile, progress: Progress) -> MachineProfile:
    """The best chunk, the fixed time of a layer, then what elementwise work reaches beside the products measured
    alone.
    """
    precision = bench.precision
    progress(f"rows that go through a {precision} layer together")
    at_once = {**profile.elementwise, precision: Curve.constant(profile.memory_bandwidth)}
    profile = replace(
        profile, choices={"chunk_rows": _best_chunk(bench, grid)}, elementwise=at_once, layer_overhead_s=0.0
    )
    progress(f"whole {precision} layers")
    least_s = sum(layer_seconds(bench.spec, 0, layer_batch(_FEW_ROWS), profile, precision).values())
    overhead_s = max(0.0, bench.layer(_FEW_ROWS, profile.chunk_rows) - least_s)
    profile = replace(profile, layer_overhead_s=overhead_s)
    sizes = sorted({*(rows for rows in grid.rows if rows > _FEW_ROWS), profile.chunk_rows})
    fitted = curve([(rows, bench.elementwise(profile, rows)) for rows in sizes])
    return replace(profile, elementwise={**profile.elementwise, precision: fitted})


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
