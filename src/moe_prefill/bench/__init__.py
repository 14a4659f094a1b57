"""Throughput of our engine and of peers on the same token ids, and where the time of a sweep goes."""

from .breakdown import CATEGORIES
from .cells import Cell, parse_cells
from .figure import figure
from .job import Job, is_preset
from .ours import run_ours
from .peers import PEERS, check_peer, compared, run_side
from .report import cell_identity, report_head, save_report

__all__ = [
    "CATEGORIES",
    "PEERS",
    "Cell",
    "Job",
    "cell_identity",
    "check_peer",
    "compared",
    "figure",
    "is_preset",
    "parse_cells",
    "report_head",
    "run_ours",
    "run_side",
    "save_report",
]
