"""Configs of published models, written from their public shapes, for dummy weights and for planning without files."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from ...errors import ModelError


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def preset(name: str) -> dict[str, Any]:
    """The raw config of a published model, by name in any case, with or without the organisation in front."""
    wanted = name.rpartition("/")[2].casefold()
    for known in preset_names():
        if known.casefold() == wanted:
            config: dict[str, Any] = json.loads(resources.files(__name__).joinpath(f"{known}.json").read_text("utf-8"))
            return config
    raise ModelError(f"there is no preset {name!r}; presets: {', '.join(preset_names())}.")
