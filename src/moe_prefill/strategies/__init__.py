"""The paper's five baselines, on the models, ops, loader and sweep plan of the plain engine: only what ranks exchange
differs.
"""

from .build import build_strategy_engine, requested_share, strategy_engine
from .collectives import Collectives, RankGroup, Traffic
from .engine import StrategyEngine
from .share import NAMES, Name, Share, share_of

__all__ = [
    "NAMES",
    "Collectives",
    "Name",
    "RankGroup",
    "Share",
    "StrategyEngine",
    "Traffic",
    "build_strategy_engine",
    "requested_share",
    "share_of",
    "strategy_engine",
]
