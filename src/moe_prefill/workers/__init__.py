"""Worker processes: one a GPU (or a share of the CPU), started, fed and watched from here. Torch-free but for
``process``, which is what a worker runs.
"""

from .engine import GroupEngine, build_scoring
from .routed import Reply, RoutedEngine, Routing
from .watch import Patience

__all__ = ["GroupEngine", "Patience", "Reply", "RoutedEngine", "Routing", "build_scoring"]
