"""Quantisation while loading: a place for a matrix that takes wide rows and keeps float8 with a scale a row."""

from __future__ import annotations

import torch

from .. import ops


class QuantizedRows:
    """Looks to the loader like the tensor it stands for, of the shape of ``values``: it can be cut and filled.

    ``values`` float8 [..., N, C] and ``scales`` float32 [..., N] may live anywhere; rows are quantised on the GPU where
    either side is on one.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        assert values.shape[:-1] == scales.shape, (values.shape, scales.shape)
        self._values, self._scales = values, scales

    @property
    def shape(self) -> torch.Size:
        return self._values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        return self._values.device

    def numel(self) -> int:
        return self._values.numel()

    def is_contiguous(self) -> bool:
        return False  # its bytes are not what a file holds

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int | slice) -> QuantizedRows:
        return QuantizedRows(self._values[index], self._scales[index])

    def copy_(self, rows: torch.Tensor) -> None:
        """Quantise and store rows of this shape."""
        if self._values.is_cuda:
            rows = rows.to(self._values.device)
        values, scales = ops.quantize_rows(rows.reshape(-1, rows.shape[-1]))
        self._values.copy_(values.view(rows.shape))
        self._scales.copy_(scales.view(rows.shape[:-1]))
