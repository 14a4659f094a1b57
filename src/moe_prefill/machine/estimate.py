"""A profile for machines that were never calibrated: datasheet numbers times what our kernels reached elsewhere."""

from __future__ import annotations

import os

from ..errors import UsageError
from .curve import Curve
from .datasheet import DATASHEETS, datasheet
from .profile import MachineProfile

# Fractions of the datasheet, measured on one H200 (torch 2.11, 2026-11-24; benchmarks/results/hopper.json): products
# as they run within sweeps rather than the first ones (power), at Qwen3-30B and -235B shapes averaged; row-wise float8
# projections, whose quantisation counts as elementwise work; experts by QuACK and DeepGEMM.
_GEMM = {
    "bfloat16": Curve.of([(128, 0.12), (1024, 0.60), (8192, 0.70)]),
    "float8": Curve.of([(128, 0.07), (1024, 0.45), (8192, 0.72)]),
}
_GROUPED = {
    "bfloat16": Curve.of([(32, 0.11), (256, 0.45), (1024, 0.63), (4096, 0.72)]),
    "float8": Curve.of([(32, 0.06), (256, 0.33), (1024, 0.54), (4096, 0.60)]),
}
_FLASH_2 = Curve.of([(128, 0.05), (512, 0.15), (4096, 0.34), (32768, 0.36)])
_FLASH_3 = Curve.of([(128, 0.09), (512, 0.28), (4096, 0.55), (32768, 0.66)])
_FLASH_3_GPUS = ("H100", "H200")
_FLOAT32 = 0.5  # of the vector units, by plain kernels
_ELEMENTWISE, _COPY, _LOCAL = 0.80, 0.85, 0.44  # of memory bandwidth; a local copy reads and writes each byte
_HOST, _PULL, _NCCL = 0.84, 0.83, 0.63  # of one direction of the link
_LAYER_OVERHEAD_S = 0.3e-3

# A CPU core of a server at some 3 GHz, by hand: order of magnitude only.
_CORE_FLOPS = {"float32": 40e9, "bfloat16": 40e9}
_CORE_BANDWIDTH = 5e9


def estimated_profile(gpu: str) -> MachineProfile:
    """What to expect of a device by the name its driver gives, or of this host's cores for ``cpu``.

    UsageError: the device is not known.
    """
    if gpu == "cpu":
        return _cpu(len(os.sched_getaffinity(0)))
    sheet = datasheet(gpu)
    if sheet is None:
        raise UsageError(
            f"nothing is known of the speed of {gpu!r}, only of {', '.join(DATASHEETS)} and cpu; run moe-prefill "
            "calibrate there and give its file with --profile"
        )
    narrow = [precision for precision in ("bfloat16", "float8") if precision in sheet.flops]
    plain = {"float32": Curve.of([(32, 0.1), (1024, _FLOAT32)]).scaled(sheet.flops["float32"])}
    links = {"host": _HOST * sheet.host, "local": _LOCAL * sheet.memory}
    attention = _FLASH_3 if any(DATASHEETS[name] is sheet for name in _FLASH_3_GPUS) else _FLASH_2
    if sheet.peer:
        links |= {"copy-engine": _PULL * sheet.peer, "nccl": _NCCL * sheet.peer}
    return _profile(
        gpu,
        gemm=plain | {p: _GEMM[p].scaled(sheet.flops[p]) for p in narrow},
        grouped=plain | {p: _GROUPED[p].scaled(sheet.flops[p]) for p in narrow},
        attention=plain | {"bfloat16": attention.scaled(sheet.flops["bfloat16"])},
        memory=sheet.memory,
        transfers=links,
        chunk_rows=16384,
    )


def _cpu(cores: int) -> MachineProfile:
    curves = {p: Curve.of([(8, 0.2 * rate * cores), (256, rate * cores)]) for p, rate in _CORE_FLOPS.items()}
    memory = _CORE_BANDWIDTH * cores
    links = dict.fromkeys(("host", "copy-engine", "nccl", "local"), _LOCAL * memory)
    return _profile(
        "cpu", gemm=curves, grouped=curves, attention=curves, memory=memory, transfers=links, chunk_rows=2048
    )


def _profile(
    gpu: str,
    *,
    gemm: dict[str, Curve],
    grouped: dict[str, Curve],
    attention: dict[str, Curve],
    memory: float,
    transfers: dict[str, float],
    chunk_rows: int,
) -> MachineProfile:
    return MachineProfile(
        gpu=gpu,
        driver="",
        torch="",
        date="",
        command="",
        model="",
        gemm=gemm,
        grouped=grouped,
        attention=attention,
        elementwise={precision: Curve.constant(_ELEMENTWISE * memory) for precision in grouped},
        memory_bandwidth=_COPY * memory,
        layer_overhead_s=_LAYER_OVERHEAD_S,
        transfers=transfers,
        bank_bytes=0,
        choices={"chunk_rows": chunk_rows},
        is_estimated=True,
    )
