"""One side of a comparison as data: settings and cells, written to a file for the process that runs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..checkpoint import read_config, resolve_directory
from ..config import EngineConfig
from ..models import preset, preset_names, spec_from_hf
from .cells import Cell, parse_cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``name``: of the model in results. ``seconds``: least time that the timed runs of a cell take. ``profile``: a
    machine profile for predictions. ``settings``: of a peer.
    """

    name: str
    config: EngineConfig
    cells: tuple[str, ...]
    seconds: float = 3.0
    profile: str | None = None
    breakdown: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def parsed(self) -> list[Cell]:
        return parse_cells(",".join(self.cells))

    @property
    def precision(self) -> str:
        """As result files name it: of the experts' products, and so of models that are published in float8, too."""
        spec = spec_from_hf(raw_config(self.config))
        if self.config.quantization == "fp8" or spec.float8_blocks:
            return "fp8"
        dtype = spec.dtype if self.config.dtype == "auto" else self.config.dtype
        return {"float32": "fp32"}.get(dtype, "bf16")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Job:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**raw | {"config": EngineConfig(**raw["config"]), "cells": tuple(raw["cells"])})


def raw_config(config: EngineConfig) -> dict[str, Any]:
    """The config.json of a preset, directory or hub model."""
    if config.load_format == "dummy" and is_preset(config.model):
        return preset(config.model)
    return dict(read_config(resolve_directory(config.model, revision=config.revision, weights=False)))


def is_preset(model: str) -> bool:
    """Whether this names a preset, with or without its organisation, and no directory."""
    known = {name.casefold() for name in preset_names()}
    return model.rpartition("/")[2].casefold() in known and not Path(model).is_dir()


@contextmanager
def long_enough(job: Job) -> Iterator[Job]:
    """The same job on a model whose context holds its longest cell: a preset's published context may be shorter than
    what is to be measured, and only shapes matter with dummy weights.
    """
    longest = max(cell.tokens for cell in job.parsed)
    made_up = job.config.load_format == "dummy" and is_preset(job.config.model)
    if not made_up or raw_config(job.config)["max_position_embeddings"] >= longest:
        yield job
        return
    with TemporaryDirectory(prefix="moe-prefill-bench-") as folder:
        raw = raw_config(job.config) | {"max_position_embeddings": longest}
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        yield replace(job, config=replace(job.config, model=folder))
