"""The expert banks of one rank: memory for each level, where the loader writes, and the source that sweeps read.

Host memory at its peak: the host pool itself (whole banks for a rank alone, 1/N of them among N ranks) and one bounce
buffer of the reader; a bank is read, converted and stored an expert at a time, straight into its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core import ModelSpec
from ..experts import (
    ALONE,
    DEFAULT_SLICE_BYTES,
    BankLayout,
    BankSource,
    HostPool,
    HostTransport,
    Ranks,
    StreamedBanks,
    Transport,
    open_lane,
)
from ..models.weights import ExpertBank
from ..residency import Level, expert_record, shard_of
from ..shapes import Shape


class BankMemory:
    """Allocates what the levels ask for; ``allocate`` and ``keep`` are the loader's callbacks, and ``source`` is what
    sweeps read once the loader is through. All ranks of a group build theirs with the same levels.

    ``dtype`` is that of the banks, ``buffers`` the number of whole-bank buffers for streamed layers. PlanError where
    the system does not give the memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        levels: Sequence[Level | None],
        *,
        dtype: torch.dtype,
        device: torch.device,
        buffers: int = 2,
        ranks: Ranks = ALONE,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
    ) -> None:
        assert len(levels) == spec.num_layers, (len(levels), spec.num_layers)
        self._layout = BankLayout(spec.num_experts, expert_record(spec, str(dtype).removeprefix("torch.")))
        self._levels = tuple(levels)
        self._device = device
        self._ranks = ranks
        self._buffers = buffers
        self._slice_bytes = slice_bytes
        self._pool = HostPool(dict.fromkeys(self._at("offloaded"), self._layout.bank_bytes), device)
        self._places = {layer: self._device_bytes(self._layout.bank_bytes) for layer in self._at("resident")}
        self._places |= {layer: self._pool[layer] for layer in self._at("offloaded")}
        self._views = {layer: self._layout.views(place) for layer, place in self._places.items()}

    def allocate(self, slot: str, shape: Shape) -> torch.Tensor:
        """The views of this rank's part of a bank, for the slots ``banks.<layer>.<field>``."""
        layer, field = _bank_slot(slot)
        return self._views[layer][field]

    def keep(self, slot: str, shape: Shape) -> range:
        """The experts of a bank that this rank holds."""
        layer, _ = _bank_slot(slot)
        if self._levels[layer] in ("resident", "offloaded"):
            return range(shape[0])
        return shard_of(shape[0], self._ranks.rank, self._ranks.size)

    def source(self) -> BankSource[ExpertBank]:
        """The source of filled banks; it owns the memory from here on."""
        transports = self._transports()
        resident = [
            self._bank(self._places[layer]) if level == "resident" else None for layer, level in enumerate(self._levels)
        ]
        count = self._buffers if transports else 0
        buffers = [self._device_bytes(self._layout.bank_bytes) for _ in range(count)]
        return StreamedBanks(resident, transports, buffers, self._bank, open_lane(self._device, self._slice_bytes))

    def _transports(self) -> dict[int, Transport]:
        """What brings each streamed layer, in order of layers."""
        by_level: dict[Level | None, Transport] = {}
        if self._at("offloaded"):
            by_level["offloaded"] = HostTransport(self._pool)
        return {layer: by_level[level] for layer, level in enumerate(self._levels) if level in by_level}

    def _at(self, level: Level) -> list[int]:
        return [layer for layer, mine in enumerate(self._levels) if mine == level]

    def _bank(self, buffer: torch.Tensor) -> ExpertBank:
        return ExpertBank(**self._layout.views(buffer))

    def _device_bytes(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self._device)


def _bank_slot(slot: str) -> tuple[int, str]:
    kind, layer, field = slot.split(".")
    assert kind == "banks", slot
    return int(layer), field
