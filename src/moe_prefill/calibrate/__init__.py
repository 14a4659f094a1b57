"""Measuring a machine: the rates that the cost model turns work into seconds with."""

from .kernels import attention_kernels, expert_kernels
from .measure import Grid, calibrate, device_name

__all__ = ["Grid", "attention_kernels", "calibrate", "device_name", "expert_kernels"]
