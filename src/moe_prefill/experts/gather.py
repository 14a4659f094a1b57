"""One rank's side of a gather by copies: the other ranks' shards of a bank into a buffer, beside the own one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .lanes import Bytes, Lane, open_lane, slices
from .transport import BytesByLink, Setup


class Gather:
    """Pulls run on the lane that asks, sliced and in turns, so that every peer is read from the start and none is
    everybody's first. The own shard is copied beside them, on a lane of its own.
    """

    def __init__(self, setup: Setup) -> None:
        self._shards = setup.layout.shards(setup.ranks.size)
        self._ranks = setup.ranks
        self._beside = open_lane(setup.device, setup.slice_bytes)

    def enqueue(self, buffer: torch.Tensor, sources: Sequence[Bytes], lane: Lane) -> BytesByLink:
        """Fill ``buffer`` (a whole bank) from each rank's shard."""
        me = self._ranks.rank
        self._beside.wait(lane.mark())
        self._beside.copy(buffer[self._shards[me]], sources[me])
        pulls = [slices(buffer[self._shards[peer]], sources[peer], lane.slice_bytes) for peer in self._ranks.peers()]
        for turn in itertools.zip_longest(*pulls):
            for target, source in filter(None, turn):
                lane.copy(target, source)
        lane.wait(self._beside.mark())
        return {"local" if rank == me else f"peer.{rank}": shard.numel() for rank, shard in enumerate(sources)}

    def close(self) -> None:
        self._beside.close()
