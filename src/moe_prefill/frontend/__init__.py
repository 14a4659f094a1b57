"""The frontend: where a request goes, what it costs, and when a worker has enough. Torch-free and without a clock."""

from .costs import Cost, RequestCosts
from .former import FormedSweep, SweepBounds, WaitingRoom
from .frontend import Admission, Frontend
from .load import Load
from .lookahead import LookAhead
from .machine import Machine, full_sweep_flops
from .policies import POLICIES, Extensions, Limits, Ours, Policy, make_policy
from .queues import Fifo, Queue, ShortestFirst
from .tables import PrefixTable
from .threshold import Threshold
from .ticket import Ticket, make_ticket
from .worker import Worker

__all__ = [
    "POLICIES",
    "Admission",
    "Cost",
    "Extensions",
    "Fifo",
    "FormedSweep",
    "Frontend",
    "Limits",
    "Load",
    "LookAhead",
    "Machine",
    "Ours",
    "Policy",
    "PrefixTable",
    "Queue",
    "RequestCosts",
    "ShortestFirst",
    "SweepBounds",
    "Threshold",
    "Ticket",
    "WaitingRoom",
    "Worker",
    "full_sweep_flops",
    "make_policy",
    "make_ticket",
]
