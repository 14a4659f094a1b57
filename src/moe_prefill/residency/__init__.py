"""Where expert banks live: the bytes of a bank, the level of every layer, and the plan that a memory budget allows.
Torch-free.
"""

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

__all__ = [
    "DTYPE_BYTES",
    "RECORD_ALIGNMENT",
    "ExpertRecord",
    "RecordField",
    "aligned",
    "bank_bytes",
    "expert_record",
    "shard_bytes",
    "shard_of",
]
