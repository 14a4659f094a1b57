"""What the controller and its workers say to one another, and how it looks on a Unix socket. Torch-free."""

from .kinds import (
    VERSION,
    Audit,
    EnginePlan,
    Failure,
    Hello,
    Message,
    PoolState,
    Ready,
    Score,
    Scored,
    Shutdown,
    Start,
)
from .packed import PackedChains, PackedEvents, PackedRequests, PackedResults
from .wire import Decoder, encode

__all__ = [
    "VERSION",
    "Audit",
    "Decoder",
    "EnginePlan",
    "Failure",
    "Hello",
    "Message",
    "PackedChains",
    "PackedEvents",
    "PackedRequests",
    "PackedResults",
    "PoolState",
    "Ready",
    "Score",
    "Scored",
    "Shutdown",
    "Start",
    "encode",
]
