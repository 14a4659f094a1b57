"""Where expert banks live and how a layer gets its own: the one seam between the mathematics and weight streaming."""

from . import device_memory
from .host_pool import HostPool
from .hybrid import HybridTransport
from .lanes import DEFAULT_SLICE_BYTES, Lane, Mark, open_lane
from .layout import BankLayout
from .nccl import NcclTransport
from .peer import PeerTransport
from .ranks import ALONE, Ranks
from .source import BankSource, ResidentBanks
from .stats import LayerTransfer, TransferStats
from .streamed import StreamedBanks
from .transport import HostTransport, Setup, Transport

__all__ = [
    "ALONE",
    "DEFAULT_SLICE_BYTES",
    "BankLayout",
    "BankSource",
    "HostPool",
    "HostTransport",
    "HybridTransport",
    "Lane",
    "LayerTransfer",
    "Mark",
    "NcclTransport",
    "PeerTransport",
    "Ranks",
    "ResidentBanks",
    "Setup",
    "StreamedBanks",
    "TransferStats",
    "Transport",
    "device_memory",
    "open_lane",
]
