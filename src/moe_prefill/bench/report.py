"""Result files: one head, then cells."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import OutputError

# What makes two cells the same measurement, so that a new one takes the old one's place.
_IDENTITY = (
    "gpu",
    "gpus",
    "part",
    "model",
    "layers",
    "precision",
    "tokens",
    "siblings",
    "strategy",
    "residency",
    "prune_last",
)
_ROUTING = ("dummy_skew", "peer", "peer_strategy", "policy", "pullers", "sliced", "staggered", "transport", "hbm_gib")


def report_head(command: Sequence[str]) -> dict[str, Any]:
    """What a result file says once; ``gpu`` is ``cpu`` where there is none."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(command),
        "git": git.stdout.strip(),
        "torch": torch.__version__,
    }


def save_report(path: Path, head: dict[str, Any], cells: Sequence[dict[str, Any]], *, append: bool = False) -> None:
    """Write a result file. ``append``: cells that the file has stay, unless the same thing was measured again.
    OutputError: it cannot be written, or is not a result file.
    """
    old = _cells_of(path) if append and path.exists() else []
    mine = [{**cell, "command": head["command"]} for cell in cells]
    for cell in mine:
        cell.pop("logits", None)  # of use in a comparison only
    facts = {"gpu": head["gpu"]}
    new = {cell_identity(facts | cell) for cell in mine}
    kept = [cell for cell in old if cell_identity(facts | cell) not in new]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**head, "cells": kept + mine}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; give another file") from error


def _cells_of(path: Path) -> list[dict[str, Any]]:
    """The cells of a file, each with the head's facts about where and when, which the next head may not repeat."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        facts = {key: found[key] for key in ("gpu", "date", "git", "torch")}
        return [facts | cell for cell in found["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is not a result file ({error}); give another one") from error


def cell_identity(cell: dict[str, Any]) -> tuple[str, ...]:
    """Equal where two cells are the same measurement, or prediction."""
    return tuple(str(cell.get(key)) for key in (*_IDENTITY, *_ROUTING))
