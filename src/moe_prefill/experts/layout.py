"""How a bank lies in a byte buffer, as tensors. E experts.

The arithmetic of a record is in ``residency``; here it becomes views. The same layout serves resident banks, shards,
host memory and stream buffers, so that the matrix products see the same strides wherever a bank came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..residency import ExpertRecord, shard_of


@dataclass(frozen=True, slots=True)
class BankLayout:
    """E records of one kind, one after the other."""

    num_experts: int
    record: ExpertRecord

    @property
    def bank_bytes(self) -> int:
        return self.num_experts * self.record.num_bytes

    def shard(self, rank: int, size: int) -> slice:
        """The bytes of a bank that a rank of ``size`` keeps; whole records, possibly none."""
        experts = shard_of(self.num_experts, rank, size)
        return slice(experts.start * self.record.num_bytes, experts.stop * self.record.num_bytes)

    def shards(self, size: int) -> list[slice]:
        return [self.shard(rank, size) for rank in range(size)]

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each field of the records in ``buffer`` (uint8, a bank or any whole records of one): [E, *shape], the expert
        dimension strided by a record.
        """
        count, rest = divmod(buffer.numel(), self.record.num_bytes)
        assert buffer.dtype == torch.uint8, buffer.dtype
        assert rest == 0, (buffer.numel(), self.record.num_bytes)
        records = buffer.view(count, self.record.num_bytes)
        return {
            field.name: records[:, field.offset : field.offset + field.num_bytes]
            .view(getattr(torch, field.dtype))
            .view(count, *field.shape)
            for field in self.record.fields
        }
