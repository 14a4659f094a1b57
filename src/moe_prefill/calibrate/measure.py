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
        return cls(rows=(16, 128, 1024, 4096), lengths=(32, 128, 512, 2048), chunks=(1024, 4096), budget_s=0.1)


def calibrate(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    model: str,
    command: str,
    grid: Grid | None = None,
    progress: Progress = lambda step: None,
) -> MachineProfile:
    """Measure this device with one layer of a model, in ``dtype``. Takes memory for that layer and two of its banks.

    UsageError: the model has no experts. PlanError: host memory for a bank cannot be pinned.
    """
    grid = grid or Grid.of(device)
    with torch.inference_mode():
        bench = LayerBench(spec, device, dtype, grid.budget_s)
        profile = _products(bench, grid, progress, model=model, command=command)
        progress("rows that go through a layer together")
        profile = replace(profile, choices={"chunk_rows": _best_chunk(bench, grid)})
        progress("whole layers")
        profile = _whole_layers(bench, grid, profile)
        del bench
    if device.type == "cuda":
        torch.cuda.empty_cache()
    progress("transfers")
    return replace(profile, transfers=measure_transfers(device, profile.bank_bytes))


def device_name(device: torch.device) -> str:
    """By which a profile knows a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _products(bench: LayerBench, grid: Grid, progress: Progress, *, model: str, command: str) -> MachineProfile:
    """Everything that is measured on its own; the rest is still to be filled."""
    spec, kind = bench.spec, bench.device.type
    progress("matrix products")
    gemm = curve([(rows, bench.gemm(rows)) for rows in grid.rows])
    progress("expert products")
    per_expert = spec.top_k / spec.num_experts
    grouped = curve([(rows * per_expert, bench.grouped(rows)) for rows in grid.rows])
    progress("attention")
    longest = max(grid.rows)
    attention = curve([(length, bench.attention(length, longest)) for length in grid.lengths])
    progress("memory")
    memory = bench.memory(_MEMORY_BYTES[kind])
    return MachineProfile(
        gpu=device_name(bench.device),
        driver=_driver() if kind == "cuda" else "",
        torch=torch.__version__,
        date=date.today().isoformat(),
        command=command,
        model=model,
        gemm={bench.precision: gemm},
        grouped={bench.precision: grouped},
        attention={bench.precision: attention},
        elementwise=Curve.constant(memory),
        memory_bandwidth=memory,
        layer_overhead_s=0.0,
        transfers={},
        bank_bytes=bank_bytes(spec, bench.precision),
    )


def _best_chunk(bench: LayerBench, grid: Grid) -> int:
    """The fewest rows at a time whose rate is the best one's, on a batch that all sizes divide."""
    tokens = max(grid.chunks)
    taken_s = {chunk: bench.layer(tokens, chunk) for chunk in sorted(grid.chunks)}
    best = min(taken_s.values())
    return next(chunk for chunk, each in taken_s.items() if _SAME * each <= best)


def _whole_layers(bench: LayerBench, grid: Grid, profile: MachineProfile) -> MachineProfile:
    """The fixed time of a layer, then what its elementwise work reaches beside the products measured alone."""
    parts = layer_seconds(bench.spec, 0, layer_batch(_FEW_ROWS), profile, bench.precision)
    profile = replace(
        profile, layer_overhead_s=max(0.0, bench.layer(_FEW_ROWS, profile.chunk_rows) - sum(parts.values()))
    )
    sizes = sorted({*(rows for rows in grid.rows if rows > _FEW_ROWS), profile.chunk_rows})
    return replace(profile, elementwise=curve([(rows, bench.elementwise(profile, rows)) for rows in sizes]))


def _driver() -> str:
    """The NVIDIA driver's version, where its tool is there to say it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout.split("\n")[0].strip() or "unknown"
