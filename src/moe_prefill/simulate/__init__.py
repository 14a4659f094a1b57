"""A virtual-time simulator: the real frontend over workers whose time comes from the cost model. Torch-free."""

from ..frontend import Machine
from .machine import plan_machine, planned_machine
from .oracle import oracle_saved_tokens
from .simulator import Outcome, simulate
from .timing import SweepTimer
from .worker import SimulatedWorker

__all__ = [
    "Machine",
    "Outcome",
    "SimulatedWorker",
    "SweepTimer",
    "oracle_saved_tokens",
    "plan_machine",
    "planned_machine",
    "simulate",
]
