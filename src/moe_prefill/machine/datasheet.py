"""What is known of machines without measuring: datasheet peaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasheet:
    """A device as its vendor describes it (SXM parts), in FLOP/s and bytes/s.

    ``flops``: dense rates of the tensor units by precision; MFU divides by these, as the paper does. ``host``: one
    direction of the PCIe link, ``peer``: one direction of NVLink, 0 where there is none.
    """

    flops: Mapping[str, float]
    memory: float
    host: float
    peer: float


DATASHEETS: dict[str, Datasheet] = {
    "B200": Datasheet(
        flops={"bfloat16": 2250e12, "float8": 4500e12, "float32": 75e12}, memory=8.0e12, host=64e9, peer=900e9
    ),
    "H200": Datasheet(
        flops={"bfloat16": 989e12, "float8": 1979e12, "float32": 67e12}, memory=4.8e12, host=64e9, peer=450e9
    ),
    "H100": Datasheet(
        flops={"bfloat16": 989e12, "float8": 1979e12, "float32": 67e12}, memory=3.35e12, host=64e9, peer=450e9
    ),
    "A100": Datasheet(flops={"bfloat16": 312e12, "float32": 19.5e12}, memory=2.0e12, host=32e9, peer=300e9),
    "L40S": Datasheet(
        flops={"bfloat16": 362e12, "float8": 733e12, "float32": 91.6e12}, memory=0.864e12, host=32e9, peer=0.0
    ),
    "L4": Datasheet(
        flops={"bfloat16": 121e12, "float8": 242e12, "float32": 30.3e12}, memory=0.3e12, host=32e9, peer=0.0
    ),
}


def datasheet(device_name: str) -> Datasheet | None:
    """The datasheet of a device by the name its driver gives, or None where it is not known."""
    words = device_name.replace("-", " ").split()
    return next((sheet for name, sheet in DATASHEETS.items() if name in words), None)


def datasheet_peak(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device by the name its driver gives, or None where it is not known."""
    sheet = datasheet(device_name)
    return None if sheet is None else sheet.flops.get(dtype)
