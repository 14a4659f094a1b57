"""What the ranks of the block-scale tests do; imported by each of their processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from moe_prefill import ops
from moe_prefill.engine.banks import BankMemory
from moe_prefill.engine.load import load_weights, open_model
from moe_prefill.experts import ALONE, Ranks

CPU = torch.device("cpu")


def bank_digests(
    ranks: Ranks, directory: str, levels: Sequence[str | None], transport: str = "copy-engine", sweeps: int = 2
) -> list[str]:
    """Of every bank that a sweep is handed: all bytes of its matrices, and the scales that its products read."""
    spec, _ = open_model(directory)
    memory = BankMemory(spec, levels, dtype=ops.FLOAT8, device=CPU, ranks=ranks, transport=transport, blocks=True)
    load_weights(directory, dtype=torch.float32, allocate=memory.allocate, keep=memory.keep)
    source, found = memory.source(), []
    for _ in range(sweeps):
        source.begin_sweep()
        for layer, level in enumerate(levels):
            bank = source.acquire(layer)
            if level is not None:
                parts = (bank.gate_up, bank.down, bank.gate_up_scale[:, :2], bank.down_scale[:, 2])
                digest = hashlib.blake2b(digest_size=16)
                for part in parts:
                    digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
                found.append(digest.hexdigest())
            source.release(layer)
        source.end_sweep()
    source.close()
    return found


def alone(directory: str, levels: Sequence[str | None]) -> list[str]:
    return bank_digests(ALONE, directory, levels)
