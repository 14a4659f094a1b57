"""Measuring a machine: the rates that the cost model turns work into seconds with."""

from .measure import Grid, calibrate, device_name

__all__ = ["Grid", "calibrate", "device_name"]
