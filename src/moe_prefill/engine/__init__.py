"""The engine: sweeps over packed batches, layer by layer."""

from .build import build_engine
from .local import LocalEngine
from .settings import plan_settings

__all__ = ["LocalEngine", "build_engine", "plan_settings"]
