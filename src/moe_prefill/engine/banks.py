"""The expert banks of one rank: memory for each level, where the loader writes, and the source that sweeps read.

Host memory at its peak: the host pool itself (whole banks for a rank alone, 1/N of them among N ranks) and one bounce
buffer of the reader; a bank is read, converted and stored an expert at a time, straight into its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from .. import ops
from ..core import Level, ModelSpec
from ..errors import UsageError
from ..experts import (
    ALONE,
    DEFAULT_SLICE_BYTES,
    BankLayout,
    BankSource,
    HostTransport,
    HybridTransport,
    NcclTransport,
    PeerTransport,
    Ranks,
    Setup,
    StreamedBanks,
    Transport,
    device_memory,
    open_lane,
)
from ..models.weights import ExpertBank
from ..residency import expert_record, shard_of
from ..shapes import Shape
from .block_scales import BlockScales, ScaledBanks
from .quantized import QuantizedBlocks, QuantizedRows


class BankMemory:
    """Allocates what the levels ask for; ``allocate`` and ``keep`` are the loader's callbacks, and ``source`` is what
    sweeps read once the loader is through. All ranks of a group build theirs with the same levels.

    ``dtype`` is that of the banks, ``buffers`` the number of whole-bank buffers for streamed layers, ``staged_shards``
    that of shards which hybrid layers bring ahead, ``transport`` how sharded banks are gathered. ``blocks``: float8
    experts keep a scale for each block of 128 x 128 instead of one a row. PlanError where the system does not give the
    memory, or a GPU no access to its peers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        levels: Sequence[Level | None],
        *,
        dtype: torch.dtype,
        device: torch.device,
        buffers: int = 2,
        staged_shards: int = 2,
        ranks: Ranks = ALONE,
        transport: str = "copy-engine",
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        blocks: bool = False,
    ) -> None:
        assert len(levels) == spec.num_layers, (len(levels), spec.num_layers)
        record = expert_record(spec, str(dtype).removeprefix("torch."), row_scales=not blocks)
        layout = BankLayout(spec.num_experts, record)
        self._setup = Setup(layout=layout, device=device, ranks=ranks, slice_bytes=slice_bytes)
        self._levels = tuple(levels)
        self._buffers = buffers
        self._staged_shards = staged_shards
        self._is_collective = transport == "nccl"
        self._transports = {
            level: self._open(level) for level in dict.fromkeys(levels) if level not in (None, "resident")
        }
        self._resident = {layer: self._new_bank() for layer in self._at("resident")}
        places = {layer: self._place(layer, level) for layer, level in enumerate(levels) if level is not None}
        self._views = {layer: layout.views(place) for layer, place in places.items()}
        self._scales = BlockScales(spec, places, device) if blocks else None

    @property
    def in_rounds(self) -> bool:
        """Whether every rank must make the same number of sweeps, with or without tokens."""
        return "hybrid" in self._levels or ("sharded" in self._levels and self._is_collective)

    def allocate(self, slot: str, shape: Shape) -> torch.Tensor:
        """A view of this rank's part of a bank, for the slots ``banks.<layer>.<field>``; float8 ones quantise what is
        written.
        """
        layer, field = _bank_slot(slot)
        views, device = self._views[layer], self._setup.device
        if self._scales is not None:
            kept = self._kept(layer)
            return cast("torch.Tensor", QuantizedBlocks(views[field], self._scales.place(layer, field, kept), device))
        if views[field].dtype == ops.FLOAT8:
            return cast("torch.Tensor", QuantizedRows(views[field], views[f"{field}_scale"], device))
        return views[field]

    def keep(self, slot: str, shape: Shape) -> range:
        """The experts of a bank that this rank holds."""
        layer, _ = _bank_slot(slot)
        return self._kept(layer)

    def _kept(self, layer: int) -> range:
        experts = self._setup.layout.num_experts
        if self._levels[layer] in ("resident", "offloaded"):
            return range(experts)
        return shard_of(experts, self._setup.ranks.rank, self._setup.ranks.size)

    def source(self) -> BankSource[ExpertBank]:
        """The source of filled banks, which owns the memory from here on. All ranks meet here."""
        if self._setup.device.type == "cuda":
            torch.cuda.synchronize(self._setup.device)
        self._setup.ranks.meet("banks/filled")
        resident = [self._bank(self._resident[i]) if i in self._resident else None for i in range(len(self._levels))]
        streamed = {i: self._transports[level] for i, level in enumerate(self._levels) if level in self._transports}
        buffers = [self._new_bank() for _ in range(self._buffers)] if streamed else []
        lane = open_lane(self._setup.device, self._setup.slice_bytes)
        banks = StreamedBanks(resident, streamed, buffers, self._bank, lane)
        if self._scales is None:
            return banks
        for layer, level in enumerate(self._levels):
            if level in ("sharded", "hybrid"):
                self._scales.share(layer, self._setup.ranks)
        return ScaledBanks(banks, self._scales)

    def _open(self, level: Level | None) -> Transport:
        """What holds and brings the banks of a level."""
        layers = self._at(level)
        if level == "offloaded":
            return HostTransport(layers, self._setup)
        if level == "hybrid" and self._is_collective:
            raise UsageError(
                "hybrid banks are gathered from staged shards by copies, which --transport nccl does not do; use "
                "--transport copy-engine, or --residency sharded with enough device memory"
            )
        if level == "hybrid":
            return HybridTransport(layers, self._setup, self._staged_shards)
        assert level == "sharded", level
        if self._is_collective:
            return NcclTransport(layers, self._setup)
        return PeerTransport(layers, self._setup)

    def _place(self, layer: int, level: Level) -> torch.Tensor:
        return self._resident[layer] if level == "resident" else self._transports[level].place(layer)

    def _at(self, level: Level | None) -> list[int]:
        return [layer for layer, mine in enumerate(self._levels) if mine == level]

    def _bank(self, buffer: torch.Tensor) -> ExpertBank:
        return ExpertBank(**self._setup.layout.views(buffer))

    def _new_bank(self) -> torch.Tensor:
        return device_memory.empty(self._setup.layout.bank_bytes, self._setup.device)


def _bank_slot(slot: str) -> tuple[int, str]:
    kind, layer, field = slot.split(".")
    assert kind == "banks", slot
    return int(layer), field
