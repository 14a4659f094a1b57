"""Where expert banks live: the bytes of a bank, the level of every layer, and the plan that a memory budget allows.
Torch-free.
"""

from .levels import Levels, parse_residency, residency_map
from .plan import Budget, Pins, ResidencyPlan, Speed
from .planner import UNBOUNDED, plan_residency, weight_bytes
from .record import (
    DTYPE_BYTES,
    RECORD_ALIGNMENT,
    ExpertRecord,
    RecordField,
    aligned,
    bank_bytes,
    expert_record,
    shard_bytes,
    shard_of,
)
from .remedies import MOST_EXPOSED, Predict, exposed_share
from .settings import TOKENS_PER_REQUEST, bank_dtype, plan_for
from .speed import predicted_speed, predictions

__all__ = [
    "DTYPE_BYTES",
    "MOST_EXPOSED",
    "RECORD_ALIGNMENT",
    "TOKENS_PER_REQUEST",
    "UNBOUNDED",
    "Budget",
    "ExpertRecord",
    "Levels",
    "Pins",
    "Predict",
    "RecordField",
    "ResidencyPlan",
    "Speed",
    "aligned",
    "bank_bytes",
    "bank_dtype",
    "expert_record",
    "exposed_share",
    "parse_residency",
    "plan_for",
    "plan_residency",
    "predicted_speed",
    "predictions",
    "residency_map",
    "shard_bytes",
    "shard_of",
    "weight_bytes",
]
