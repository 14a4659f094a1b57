"""What is being loaded, said before the engine is built: with large models that is most of a short job's time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..config import EngineConfig
from .flags import RunOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in a few words. ``num_bytes`` of its weight files; None: they are made up. ``dtype`` None: not said."""

    model: str
    num_bytes: int | None
    dtype: str | None
    device: str

    @classmethod
    def of(cls, config: EngineConfig) -> Loaded:
        """Find out without reading weights; the model is on the disk already, unless it is made up."""
        device = config.device if config.gpus is None else f"{config.gpus} x {config.device}"
        asked = None if config.dtype == "auto" else config.dtype
        if config.load_format == "dummy":
            return cls(model=f"dummy {config.model}", num_bytes=None, dtype=asked, device=device)
        from ..checkpoint import read_config, resolve_directory

        directory = resolve_directory(config.model, revision=config.revision)
        raw = read_config(directory)
        stored = raw.get("dtype", raw.get("torch_dtype"))
        return cls(
            model=config.model,
            num_bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
            dtype=asked or (stored if isinstance(stored, str) else None),
            device=device,
        )

    def line(self) -> str:
        """For people: loading Qwen/Qwen3-30B-A3B (61.1 GB, bfloat16, cuda)."""
        size = None if self.num_bytes is None else size_text(self.num_bytes)
        device = None if self.device == "auto" else self.device
        about = ", ".join(filter(None, (size, self.dtype, device)))
        return f"loading {self.model}" + (f" ({about})" if about else "")


@contextmanager
def loading(config: EngineConfig, run: RunOptions) -> Iterator[None]:
    """Say on standard error what is loaded while the body loads it: with the time on a terminal, else one line."""
    if run.quiet:
        yield
        return
    loaded = Loaded.of(config)
    if run.json:
        facts = {"model": loaded.model, "bytes": loaded.num_bytes, "dtype": loaded.dtype, "device": loaded.device}
        print(json.dumps({"event": "loading", **facts}), file=sys.stderr, flush=True)
        yield
    elif not sys.stderr.isatty():
        print(loaded.line(), file=sys.stderr, flush=True)
        yield
    else:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            progress.add_task(escape(loaded.line()), total=None)
            yield


def size_text(num_bytes: int) -> str:
    """Bytes for people, in powers of ten as disks and hubs count: 27 MB, 61.1 GB."""
    if num_bytes < 10**9:
        return f"{num_bytes / 10**6:,.0f} MB"
    return f"{num_bytes / 10**9:,.1f} GB"
