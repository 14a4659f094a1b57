"""``moe-prefill calibrate``: measure this machine for a model's shapes, write the profile, show rates and T."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..core import Level, ModelSpec
from ..costmodel import Saturation, Streaming, saturation
from ..machine import Curve, MachineProfile, datasheet, save_profile

_BUFFERS = (2, 3)
_FILE_COLUMNS = 120


def calibrate(
    model: Annotated[str, typer.Option("--model", "-m", help="Model directory, hub id, or a preset's name.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the profile here (JSON).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str | None, typer.Option("--quantization", help="fp8: also with 8-bit experts.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Depth that T is for; default: all.")] = None,
    tokens: Annotated[int, typer.Option("--request-tokens", min=1, help="Length of requests that T is for.")] = 1024,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure this machine's rates at a model's shapes (no weights are loaded) and find the saturation threshold T."""
    import torch

    from ..calibrate import attention_kernels, expert_kernels
    from ..calibrate import calibrate as measure
    from ..config import EngineConfig
    from ..engine.build import pick_device, pick_dtype
    from ..engine.cores import keep_freed_memory
    from ..engine.load import open_model

    EngineConfig(model=model, dtype=dtype, quantization=quantization)  # type: ignore[arg-type]  # refuses others
    target = pick_device(device)
    if target.type == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        keep_freed_memory()  # as the engine does
    spec, _ = open_model(model, "dummy", layers)
    computed = pick_dtype(dtype, spec, target)
    console, notes = Console(highlight=False, width=_width()), Console(stderr=True, highlight=False)
    said: list[str] = []
    with notes.status("calibrating") as status:
        profile = measure(
            spec,
            target,
            computed,
            model=model,
            command=shlex.join(["moe-prefill", *sys.argv[1:]]),
            float8=quantization == "fp8",
            progress=lambda step: status.update(f"measuring {step}"),
            note=said.append,
        )
    for line in said:
        notes.print(line, markup=False, soft_wrap=True)
    if output is not None:
        save_profile(profile, output)
    ranks = _ranks(profile)
    console.print(_rates(profile))
    for line in [*attention_kernels(spec, target, computed), *expert_kernels(target, computed)]:
        console.print(f"attention  {line}", markup=False, soft_wrap=True)
    console.print(_thresholds(spec, profile, ranks, tokens))
    if output is not None:
        console.print(f"profile -> {output}", markup=False, soft_wrap=True)


def _width() -> int | None:
    """Of a terminal its own; a file or a pipe gets whole lines."""
    return None if sys.stdout.isatty() else _FILE_COLUMNS


def _ranks(profile: MachineProfile) -> int:
    """GPUs that could share a bank; T of sharded banks depends on how many."""
    if profile.gpu == "cpu" or "copy-engine" not in profile.transfers:
        return 1
    import torch

    return torch.cuda.device_count()


def _rates(profile: MachineProfile) -> Table:
    """Each rate beside its ceiling: the datasheet's, or on a CPU the best product that was seen."""
    kind = "datasheet" if datasheet(profile.gpu) else "best product"
    table = Table(title=f"{profile.gpu}, {profile.model}, torch {profile.torch}; ceiling: {kind}")
    for name in ("operation", "size", "rate", "ceiling", "share"):
        table.add_column(name, justify="left" if name in ("operation", "size") else "right", overflow="fold")
    for row in _rows(profile):
        table.add_row(*row)
    return table


def _rows(profile: MachineProfile) -> Iterator[tuple[str, ...]]:
    sheet = datasheet(profile.gpu)
    for name, unit, curves in (
        ("product", "rows", profile.gemm),
        ("expert product", "rows an expert", profile.grouped),
        ("attention", "tokens", profile.attention),
    ):
        for precision, curve in curves.items():
            yield from _curve_rows(f"{name} {precision}", unit, curve, profile.peak(precision))
    memory = sheet.memory if sheet else None
    yield "memory, read + write", "", *_bytes(profile.memory_bandwidth, memory)
    for precision, curve in profile.elementwise.items():
        for size, rate in zip(curve.sizes, curve.rates, strict=True):  # no share: what is fused moves fewer bytes
            yield f"elementwise {precision}", f"{size:,.0f} rows", *_bytes(rate, None)
    links: dict[str, float] = {}
    if sheet:  # a local copy reads and writes each byte
        links = {"host": sheet.host, "copy-engine": sheet.peer, "nccl": sheet.peer, "local": sheet.memory / 2}
    for transport, rate in profile.transfers.items():
        yield transport, f"{profile.bank_bytes / 2**20:,.1f} MiB", *_bytes(rate, links.get(transport))
    yield "fixed time of a layer", "", f"{profile.layer_overhead_s * 1e3:.3f} ms", "", ""
    yield "rows of a chunk", "", f"{profile.chunk_rows:,}", "", ""


def _curve_rows(name: str, unit: str, curve: Curve, peak: float) -> Iterator[tuple[str, ...]]:
    for size, rate in zip(curve.sizes, curve.rates, strict=True):
        yield name, f"{size:,.0f} {unit}", f"{rate / 1e12:,.3g} TFLOP/s", f"{peak / 1e12:,.3g}", f"{rate / peak:.0%}"


def _bytes(rate: float, ceiling: float | None) -> tuple[str, str, str]:
    share = (f"{ceiling / 1e9:,.3g}", f"{rate / ceiling:.0%}") if ceiling else ("", "")
    return f"{rate / 1e9:,.3g} GB/s", *share


def _thresholds(spec: ModelSpec, profile: MachineProfile, ranks: int, tokens: int) -> Table:
    """T with every bank resident, and with every bank streamed in each way that this machine could."""
    table = Table(title=f"Saturation threshold, {spec.num_layers} layers, requests of {tokens:,} tokens")
    for name in ("banks", "T (TFLOP)", "tokens", "t_paper (TFLOP)"):
        table.add_column(name, justify="left" if name == "banks" else "right")
    ways: list[tuple[str, Level, int]] = [("resident", "resident", 1)]
    ways += [(f"offloaded, {buffers} buffers", "offloaded", buffers) for buffers in _BUFFERS]
    if ranks > 1:
        ways += [(f"sharded over {ranks}, {buffers} buffers", "sharded", buffers) for buffers in _BUFFERS]
    for name, level, buffers in ways:
        table.add_row(name, *_threshold(_saturation(spec, profile, level, buffers, ranks, tokens)))
    return table


def _saturation(
    spec: ModelSpec, profile: MachineProfile, level: Level, buffers: int, ranks: int, tokens: int
) -> Saturation:
    return saturation(
        spec,
        profile,
        precision=[*profile.grouped][-1],  # the narrowest experts that were measured
        streaming=Streaming(
            levels=tuple(level if layer.sparse else None for layer in spec.layers),
            bank_bytes=profile.bank_bytes,
            depth=buffers,
            ranks=ranks,
        ),
        tokens_per_request=tokens,
    )


def _threshold(found: Saturation) -> tuple[str, str, str]:
    paper = f"{found.t_paper / 1e12:,.4g}" if found.t_paper else "nothing streams"
    return f"{found.flops / 1e12:,.4g}", f"{found.tokens:,}", paper
