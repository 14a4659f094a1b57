"""The sweeps that the planner asks for, from a machine profile and the cost model."""

from __future__ import annotations

from dataclasses import replace

from ..core import ModelSpec
from ..costmodel import Batch, Peer, Streaming, SweepPrediction, predict_sweep
from ..machine import MachineProfile
from .levels import Levels, bank_buffers
from .plan import Speed
from .record import bank_bytes
from .remedies import Predict

PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "float8_e4m3fn": "float8"}  # of products, by storage


def predictions(
    spec: ModelSpec,
    profile: MachineProfile,
    *,
    bank_dtype: str,
    ranks: int = 1,
    tokens_per_request: int = 1024,
    transfer: Peer = "copy-engine",
) -> Predict:
    """Predicted sweeps of one rank, for the planner. UsageError while it is called: the profile lacks a rate."""

    def predict(levels: Levels, tokens: int, chunk_rows: int, buffers: int) -> SweepPrediction:
        streaming = Streaming(
            levels=levels, bank_bytes=bank_bytes(spec, bank_dtype), depth=max(1, buffers), ranks=ranks, peer=transfer
        )
        batch, machine = Batch.uniform(tokens, tokens_per_request), with_chunks(profile, chunk_rows)
        return predict_sweep(spec, batch, machine, precision=PRECISIONS[bank_dtype], streaming=streaming)

    return predict


def predicted_speed(predict: Predict, prefetch_depth: int | None = None) -> Speed:
    """Predicted tokens/s of one rank, waiting for banks included."""

    def speed(levels: Levels, tokens: int, chunk_rows: int) -> float:
        buffers = bank_buffers(levels, prefetch_depth)
        return tokens / predict(levels, tokens, chunk_rows, buffers).sweep_s

    return speed


def with_chunks(profile: MachineProfile, chunk_rows: int) -> MachineProfile:
    """The same machine with chunks of this many rows."""
    return replace(profile, choices={**profile.choices, "chunk_rows": chunk_rows})
