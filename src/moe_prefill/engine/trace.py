"""A trace of sweeps in the Chrome format (chrome://tracing, ui.perfetto.dev): copies and compute, one above the other.

The file is a JSON array whose closing bracket the format does not require, so what was written before a crash can be
read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from ..errors import OutputError
from ..experts import LayerTransfer, TransferStats

_COMPUTE, _COPIES = 0, 1  # the rows of a process in the picture


class TraceWriter:
    """Writes one process of a trace: layers on the compute row, waits among them, and copies on the row below.

    OutputError: the file cannot be written.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self._rank = rank
        try:
            self._file: TextIO = open(path, "w", encoding="utf-8")  # noqa: SIM115  it stays open
        except OSError as error:
            raise OutputError(f"the trace {path} cannot be written: {error.strerror}; give another --trace") from error
        self._file.write("[\n")
        self._name("process_name", None, f"rank {rank}")
        self._name("thread_name", _COMPUTE, "compute")
        self._name("thread_name", _COPIES, "copies")

    def add(self, sweep: TransferStats) -> None:
        """All layers of a finished sweep."""
        for layer in sweep.layers:
            self._layer(layer, sweep.begin_ms)
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._file.write("{}]\n")
            self._file.close()

    def _layer(self, layer: LayerTransfer, begin_ms: float) -> None:
        name = f"layer {layer.layer}"
        if layer.wait_ms > 1e-3:
            first = begin_ms + layer.compute_begin_ms - layer.wait_ms
            self._span(_COMPUTE, f"wait for bank {layer.layer}", first, layer.wait_ms)
        compute_ms = layer.compute_end_ms - layer.compute_begin_ms
        self._span(_COMPUTE, name, begin_ms + layer.compute_begin_ms, compute_ms)
        if layer.copy_begin_ms is not None and layer.copy_end_ms is not None:
            copy_ms = layer.copy_end_ms - layer.copy_begin_ms
            self._span(_COPIES, f"bank {layer.layer}", begin_ms + layer.copy_begin_ms, copy_ms, layer.bytes_by_link)

    def _span(self, row: int, name: str, begin_ms: float, ms: float, args: Any = None) -> None:
        event = {"name": name, "ph": "X", "pid": self._rank, "tid": row, "ts": 1e3 * begin_ms, "dur": 1e3 * ms}
        self._write(event | ({"args": dict(args)} if args else {}))

    def _name(self, kind: str, row: int | None, name: str) -> None:
        event = {"name": kind, "ph": "M", "pid": self._rank, "args": {"name": name}}
        self._write(event if row is None else event | {"tid": row})

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event) + ",\n")
