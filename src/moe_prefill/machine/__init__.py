"""A machine as numbers: datasheet peaks, and measured rates in a versioned JSON file. Torch-free."""

from .curve import Curve
from .datasheet import DATASHEETS, Datasheet, datasheet, datasheet_peak
from .estimate import estimated_profile
from .profile import FORMAT_VERSION, MachineProfile, Transport, load_profile, save_profile

__all__ = [
    "DATASHEETS",
    "FORMAT_VERSION",
    "Curve",
    "Datasheet",
    "MachineProfile",
    "Transport",
    "datasheet",
    "datasheet_peak",
    "estimated_profile",
    "load_profile",
    "save_profile",
]
