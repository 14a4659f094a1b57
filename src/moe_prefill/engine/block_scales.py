"""The block scales of all banks, which every rank keeps in its own device's memory.

They are a few thousandths of a bank (for Qwen3-235B-A22B 0.1 of 225 GiB), and without them an expert's record is its
three matrices without a gap: the form in which the products take a whole bank. So they are loaded where an expert is
kept, told to the other ranks once, and never move again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from .. import ops
from ..core import ModelSpec
from ..experts import BankSource, Ranks, TransferStats
from ..models.weights import ExpertBank
from ..residency import shard_of


class BlockScales:
    """``grids`` by layer: float32 [E, 3, I / 128, D / 128] of gate and up (the third is not used) and [E, 3, D / 128,
    I / 128] of down (the first two are not used), see ``ops.experts``.
    """

    def __init__(self, spec: ModelSpec, layers: Iterable[int], device: torch.device) -> None:
        n, c = spec.expert_size // ops.BLOCK, spec.hidden_size // ops.BLOCK
        self._grids = {
            layer: (
                torch.zeros(spec.num_experts, 3, n, c, device=device),
                torch.zeros(spec.num_experts, 3, c, n, device=device),
            )
            for layer in layers
        }

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._grids[layer]

    def place(self, layer: int, field: str, experts: range) -> torch.Tensor:
        """Where the scales of a field of these experts go: a view [len(experts), rows of blocks, columns of blocks]."""
        gates, downs = self._grids[layer]
        mine = slice(experts.start, experts.stop)
        return gates[mine, :2].flatten(1, 2) if field == "gate_up" else downs[mine, 2]

    def share(self, layer: int, ranks: Ranks) -> None:
        """Fill in what the other ranks have loaded of a layer of which each keeps its shard. All ranks come here."""
        for name, grid in zip(("gate_up", "down"), self._grids[layer], strict=True):
            shards = [shard_of(len(grid), rank, ranks.size) for rank in range(ranks.size)]
            mine = grid[shards[ranks.rank].start : shards[ranks.rank].stop].cpu().numpy().tobytes()
            parts = ranks.exchange(f"banks/scales/{layer}/{name}", mine)
            for shard, part in zip(shards, parts, strict=True):
                if len(shard):
                    theirs = torch.frombuffer(bytearray(part), dtype=torch.float32)
                    grid[shard.start : shard.stop].copy_(theirs.view(len(shard), *grid.shape[1:]))


class ScaledBanks(BankSource[ExpertBank]):
    """Banks of another source, with their scales."""

    def __init__(self, banks: BankSource[ExpertBank], scales: BlockScales) -> None:
        self._banks, self._scales = banks, scales

    def acquire(self, layer: int) -> ExpertBank | None:
        bank = self._banks.acquire(layer)
        if bank is None:
            return None
        gate_up_scale, down_scale = self._scales.of(layer)
        return replace(bank, gate_up_scale=gate_up_scale, down_scale=down_scale)

    def begin_sweep(self) -> None:
        self._banks.begin_sweep()

    def release(self, layer: int) -> None:
        self._banks.release(layer)

    def end_sweep(self) -> None:
        self._banks.end_sweep()

    def take_stats(self) -> list[TransferStats]:
        return self._banks.take_stats()

    def abort(self, reason: str) -> None:
        self._banks.abort(reason)

    def close(self) -> None:
        self._banks.close()
