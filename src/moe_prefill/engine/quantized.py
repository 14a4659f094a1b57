"""Quantisation while loading: places for matrices that take wide rows and keep float8 with scales.

To the loader they look like the tensor they stand for: they can be cut and filled. Values and scales may live anywhere;
the work is done on the engine's device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .. import ops

# Forms of float8 products: whether experts, and linear maps, have a scale a block rather than one a row.
FORMS = {
    "fp8": (False, False),
    "fp8-blocks": (True, False),
    "fp8-linear-blocks": (False, True),
    "fp8-published": (True, True),
}


def blocks_of(form: str | None) -> tuple[bool, bool]:
    """Whether experts and whether linear maps have a scale a block; neither where the model is not in float8."""
    return FORMS.get(form or "", (False, False))


class Quantized(ABC):
    """``values`` float8 of the shape of the tensor, ``scales`` float32; ``device``: where rows are quantised."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, device: torch.device | None = None) -> None:
        self._values, self._scales = values, scales
        self._device = device or values.device

    @property
    def values(self) -> torch.Tensor:
        return self._values

    @property
    def shape(self) -> torch.Size:
        return self._values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        return self._device

    def numel(self) -> int:
        return self._values.numel()

    def is_contiguous(self) -> bool:
        return False  # its bytes are not what a file of wide rows holds

    def __len__(self) -> int:
        return len(self._values)

    @abstractmethod
    def rows_without_scale(self) -> torch.Tensor:
        """How many scales of each row are not finite, int64 [rows]."""

    @abstractmethod
    def matrix(self) -> ops.Matrix:
        """What has been stored, for the products."""

    @abstractmethod
    def copy_(self, rows: torch.Tensor) -> None:
        """Quantise and store rows of this shape."""


class QuantizedRows(Quantized):
    """A scale a row: ``values`` [..., N, C] and ``scales`` [..., N]."""

    def __getitem__(self, index: int | slice) -> QuantizedRows:
        return QuantizedRows(self._values[index], self._scales[index], self._device)

    def copy_(self, rows: torch.Tensor) -> None:
        flat = rows.to(self._device).reshape(-1, rows.shape[-1])
        values, scales = ops.quantize_rows(flat)
        self._values.copy_(values.view(rows.shape))
        self._scales.copy_(scales.view(rows.shape[:-1]))

    def rows_without_scale(self) -> torch.Tensor:
        return (~torch.isfinite(self._scales)).long()

    def matrix(self) -> ops.Float8Rows:
        return ops.Float8Rows(self._values, self._scales)


class QuantizedBlocks(Quantized):
    """A scale a block of 128 x 128: ``values`` [..., N, C] and ``scales`` [..., N / 128, C / 128]. Takes whole blocks,
    also such as are stored with their scales.
    """

    def __getitem__(self, index: int | slice) -> QuantizedBlocks:
        if isinstance(index, int) or self._values.ndim > 2:
            return QuantizedBlocks(self._values[index], self._scales[index], self._device)
        first, last, _ = index.indices(len(self._values))
        assert first % ops.BLOCK == last % ops.BLOCK == 0, index
        scales = self._scales[first // ops.BLOCK : last // ops.BLOCK]
        return QuantizedBlocks(self._values[first:last], scales, self._device)

    def copy_(self, rows: torch.Tensor) -> None:
        self.copy_blocks(*ops.quantize_blocks(rows.to(self._device)))

    def rows_without_scale(self) -> torch.Tensor:
        wrong = (~torch.isfinite(self._scales)).sum(-1)
        return wrong.repeat_interleave(ops.BLOCK)[: len(self._values)]

    def matrix(self) -> ops.Float8Blocks:
        return ops.Float8Blocks(self._values, self._scales)

    def copy_blocks(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self._values.copy_(values)
        self._scales.copy_(scale)
