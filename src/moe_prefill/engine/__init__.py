"""The engine: sweeps over packed batches, layer by layer."""

from .build import build_engine
from .local import LocalEngine
from .memory import peak_bytes
from .settings import plan_settings

__all__ = ["LocalEngine", "build_engine", "peak_bytes", "plan_settings"]
