"""What is known of machines without measuring: datasheet peaks. Torch-free."""

from __future__ import annotations

# Dense FLOP/s of the tensor units, from the vendors' datasheets (SXM parts). MFU divides by these, as the paper does.
_PEAKS: dict[str, dict[str, float]] = {
    "H200": {"bfloat16": 989e12, "float8": 1979e12, "float32": 67e12},
    "H100": {"bfloat16": 989e12, "float8": 1979e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float8": 733e12, "float32": 91.6e12},
    "L4": {"bfloat16": 121e12, "float8": 242e12, "float32": 30.3e12},
}


def datasheet_peak(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device by the name its driver gives, or None where it is not known."""
    words = device_name.replace("-", " ").split()
    for name, peaks in _PEAKS.items():
        if name in words:
            return peaks.get(dtype)
    return None
