"""``moe-prefill bench``: throughput of a model on this machine, where the time of a layer goes, and ratios to peers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..config import EngineConfig
from ..errors import OutputError, UsageError

_SKEWS = {"balanced": None, "skew16": 16.0}


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset's name, a model directory or a hub id.")],
    cells: Annotated[
        str, typer.Option(help="Tokens a request, or siblings x tail @ prefix (8x16@2048), separated by commas.")
    ] = "256,4096,32768",
    load_format: Annotated[str | None, typer.Option(help="dummy or safetensors; default: dummy for a preset.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="fp8: experts in 8 bits.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="The first N layers of a dummy model.")] = None,
    routing: Annotated[str, typer.Option(help="Of dummy weights: balanced, or skew16 (max/min load).")] = "balanced",
    gpus: Annotated[int | None, typer.Option(min=1, help="Worker processes, one a GPU.")] = None,
    residency: Annotated[str | None, typer.Option(help="Where expert banks live; see classify --help.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sweep; default: the memory plan's.")
    ] = None,
    chunk_rows: Annotated[int | None, typer.Option(min=1, help="Rows that go through a layer at a time.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    prune_last: Annotated[
        bool, typer.Option("--prune-last", help="The last layer computes only what is read, as jobs do.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Least time of a cell's timed runs.")] = 5.0,
    profile: Annotated[str | None, typer.Option(metavar="FILE", help="Rates of this machine, for predictions.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Also run vllm or transformers; may be repeated.")] = None,
    peer_site: Annotated[str | None, typer.Option(metavar="DIR", help="A folder of packages with the peer.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the cells here (JSON).")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Save a picture of the layers' time.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure tokens/s and MFU of a model, and show where the time of a layer goes."""
    from ..bench import Job, check_peer, is_preset, report_head, run_ours

    for name in peer or []:
        check_peer(name, peer_site)
    if plot is not None and plot.suffix != ".svg":
        raise UsageError(f"--plot is {plot}; pictures are SVG, so give a name that ends in .svg")
    config = EngineConfig(
        model=model,
        load_format=_format(load_format, is_preset(model)),
        device=device,
        dtype=dtype,
        quantization=quantization,  # type: ignore[arg-type]  # refuses others
        num_layers=layers,
        dummy_skew=_skew(routing),
        gpus=gpus,
        residency=residency,
        max_sweep_tokens=max_tokens,
        chunk_rows=chunk_rows,
        threads=threads,
        prune_last=prune_last,
        profile=profile,
    )
    job = Job(name=Path(model).name, config=config, cells=tuple(cells.split(",")), seconds=seconds, profile=profile)
    assert job.parsed  # a cell that cannot be read is refused before the weights load
    head, console = report_head(["moe-prefill", *sys.argv[1:]]), Console(highlight=False)
    found = _with_peers(job, peer, peer_site) if peer else run_ours(job)
    _report(console, found, head, output, plot)


def _report(
    console: Console, found: list[dict[str, Any]], head: dict[str, Any], output: Path | None, plot: Path | None
) -> None:
    """Print the cells, and save them and their picture where asked."""
    from ..bench import save_report

    console.print(_rates(found, head))
    if any("breakdown" in cell for cell in found):
        console.print(_layers(found))
    if output is not None:
        save_report(output, head, found)
        console.print(f"cells -> {output}", markup=False, soft_wrap=True)
    if plot is not None:
        _save_plot(plot, found, head)
        console.print(f"picture -> {plot}", markup=False, soft_wrap=True)


def _with_peers(job: Any, peers: Sequence[str], site: str | None) -> list[dict[str, Any]]:
    """Our cells and a copy of them beside each peer; every side has a process of its own."""
    from ..bench import compared, run_side

    ours = run_side("ours", job)
    return [cell for peer in peers for cell in compared(ours, run_side(peer, job, site=site))]


def _format(given: str | None, is_preset: bool) -> Literal["safetensors", "dummy"]:
    return given or ("dummy" if is_preset else "safetensors")  # type: ignore[return-value]  # EngineConfig refuses


def _skew(routing: str) -> float | None:
    if routing not in _SKEWS:
        raise UsageError(f"--routing is {routing!r}; it must be one of {', '.join(_SKEWS)}")
    return _SKEWS[routing]


def _rates(cells: Sequence[Mapping[str, Any]], head: Mapping[str, Any]) -> Table:
    """One row a cell."""
    first = cells[0]
    title = (
        f"{first['model']}, {first.get('layers')} layers, {first['precision']}, {head['gpu']}, torch {head['torch']}"
    )
    table = Table(title=title)
    names = ["tokens a request", "sweep", "ms", "tokens/s", "MFU", "predicted tokens/s", "expert load max/mean"]
    names += ["peer", "peer tokens/s", "ratio"] if any("peer" in cell for cell in cells) else []
    for name in names:
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(*_row(cell)[: len(names)])
    return table


def _row(cell: Mapping[str, Any]) -> list[str]:
    shape = f"{cell['tokens']:,}" + (f" ({cell['siblings']} x {cell['tail']})" if "siblings" in cell else "")
    return [
        shape,
        f"{cell['sweep_tokens']:,}",
        f"{cell['sweep_ms']:,.1f}",
        f"{cell['tokens_per_s']:,.0f}",
        _number(cell, "mfu", ".1%"),
        _number(cell, "predicted_tokens_per_s", ",.0f"),
        _number(cell, "expert_load_max_over_mean", ".2f"),
        f"{cell.get('peer', '')} {cell.get('peer_version', '')}",
        _number(cell, "peer_tokens_per_s", ",.0f"),
        _number(cell, "ratio", ".2f"),
    ]


def _number(cell: Mapping[str, Any], name: str, form: str) -> str:
    return format(cell[name], form) if name in cell else ""


def _layers(cells: Sequence[Mapping[str, Any]]) -> Table:
    """Milliseconds of a layer by what takes them; embedding and head are spread over the layers."""
    from ..bench import CATEGORIES

    table = Table(title="ms a layer, from a profiled sweep")
    table.add_column("tokens a request", justify="right")
    for name in CATEGORIES:
        table.add_column(name, justify="right")
    for cell in cells:
        if "breakdown" in cell:
            parts, layers = cell["breakdown"]["ms"], cell["breakdown"]["layers"]
            total = sum(parts.values())
            shown = [f"{parts.get(name, 0.0) / layers:.2f} ({parts.get(name, 0.0) / total:.0%})" for name in CATEGORIES]
            table.add_row(f"{cell['tokens']:,}", *shown)
    return table


def _save_plot(path: Path, cells: Sequence[dict[str, Any]], head: Mapping[str, Any]) -> None:
    from ..bench import figure

    try:
        path.write_text(figure(cells, f"Where a sweep's time goes: {head['gpu']}, {head['date']}"), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; give another --plot") from error
