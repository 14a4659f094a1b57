"""Workloads for simulations and benchmarks: the paper's aggregated one, mixes, traces and tables. Torch-free."""

from .files import read_trace, write_table, write_trace
from .lengths import skewed_lengths, spread_lengths
from .mixes import MIXES, make_workload
from .workload import Workload

__all__ = [
    "MIXES",
    "Workload",
    "make_workload",
    "read_trace",
    "skewed_lengths",
    "spread_lengths",
    "write_table",
    "write_trace",
]
