"""Throughput of our engine and of peers on the same token ids, and where the time of a sweep goes."""

from .cells import Cell, parse_cells
from .job import Job
from .ours import run_ours
from .peers import PEERS, check_peer, compared, run_side
from .report import report_head, save_report

__all__ = [
    "PEERS",
    "Cell",
    "Job",
    "check_peer",
    "compared",
    "parse_cells",
    "report_head",
    "run_ours",
    "run_side",
    "save_report",
]
