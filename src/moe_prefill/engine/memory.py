"""The memory plan: how many tokens a sweep may hold and how many rows go through a layer at a time, from a budget in
bytes.

Live during a sweep: the residual, K and V of one layer and the rope tables for every token; one chunk's activations;
one block of LM head logits. Weights and banks are counted by the caller.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..core import EngineLimits, ModelSpec
from ..errors import PlanError

GIB = 1 << 30
_LOGITS_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
_CHUNK_ROWS = {"cuda": 16384, "cpu": 4096}
_SWEEP_TOKENS = {"cuda": 131072, "cpu": 16384}  # more brings nothing: the plateau is long reached
_SAFETY = 0.9  # of the free memory; the rest is for the allocator's rounding and the kernels' own workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes in tokens or rows; ``bytes_by_purpose`` explains the total."""

    max_sweep_tokens: int
    chunk_rows: int
    max_gathered_keys: int
    logits_block_bytes: int
    bytes_by_purpose: dict[str, int]

    def limits(self, spec: ModelSpec) -> EngineLimits:
        longest = min(spec.max_positions, self.max_sweep_tokens)
        return EngineLimits(
            max_request_tokens=longest, max_sweep_tokens=self.max_sweep_tokens, vocab_size=spec.vocab_size
        )


def token_bytes(spec: ModelSpec, element: int) -> int:
    """Bytes that every token of a sweep holds: residual, K, V, rope tables, ids and positions."""
    kv = 2 * spec.num_kv_heads * spec.head_dim
    return element * (spec.hidden_size + kv + spec.rope.dim) + 16


def chunk_row_bytes(spec: ModelSpec, element: int) -> int:
    """Bytes that a row of a chunk holds at the worst moment of a layer: in attention or among the experts."""
    q_width, d_model = spec.num_heads * spec.head_dim, spec.hidden_size
    attention = element * (2 * d_model + 2 * q_width) + 4 * q_width * 2
    rows = spec.top_k if spec.num_sparse_layers else 0
    sparse = element * rows * (2 * d_model + 3 * spec.expert_size) + 24 * rows + 8 * spec.num_experts
    dense = 3 * element * max(spec.dense_size, spec.shared_size)
    return max(attention, element * 3 * d_model + sparse + dense)


def plan_memory(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, budget: int, wanted: int | None
) -> MemoryPlan:
    """Fit a sweep into ``budget`` bytes (after weights). PlanError, with the numbers, when not even one token fits or
    ``wanted`` does not.
    """
    kind, element = device.type, dtype.itemsize
    logits = min(_LOGITS_BYTES[kind], max(budget // 8, 16 * 4 * spec.vocab_size))
    per_token, per_row = token_bytes(spec, element), chunk_row_bytes(spec, element)
    key_bytes = 2 * spec.num_kv_heads * spec.head_dim * element
    chunk_rows = _CHUNK_ROWS[kind]
    while chunk_rows > 256 and chunk_rows * (per_row + 2 * key_bytes) > (budget - logits) // 2:
        chunk_rows //= 2
    workspace = chunk_rows * (per_row + 2 * key_bytes)
    room = (budget - logits - workspace) // (per_token + key_bytes)  # a request's own keys may all be gathered once
    if room < (wanted or 1):
        needed = logits + workspace + (wanted or 1) * (per_token + key_bytes)
        raise PlanError(
            f"a sweep of {wanted or 1} tokens needs {_gib(needed)} GiB beside the weights, and "
            f"{_gib(max(budget, 0))} GiB are there; give more memory or a smaller --max-sweep-tokens"
        )
    tokens = min(wanted or _SWEEP_TOKENS[kind], room)
    return MemoryPlan(
        max_sweep_tokens=tokens,
        chunk_rows=chunk_rows,
        max_gathered_keys=2 * chunk_rows,
        logits_block_bytes=logits,
        bytes_by_purpose={
            "tokens": tokens * per_token,
            "gathered keys": tokens * key_bytes,
            "chunk": workspace,
            "logits": logits,
        },
    )


def free_bytes(device: torch.device, limit_gib: float | None) -> int:
    """Bytes that a new allocation may take on ``device``, at most ``limit_gib``."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = _available_host_bytes() // 2  # the other half is the system's and the tables'
    free = int(free * _SAFETY)
    return free if limit_gib is None else min(free, int(limit_gib * GIB))


def _available_host_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
