"""Model families: configs, tensor names and mathematics. This file and what it imports need no torch."""

from .presets import preset, preset_names
from .registry import FAMILIES, Family, family, spec_from_hf

__all__ = ["FAMILIES", "Family", "family", "preset", "preset_names", "spec_from_hf"]
