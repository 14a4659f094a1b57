"""Rows in float8 with a float32 scale each, and what an operation may take as its rows. R rows, C channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .quantize import FLOAT8, dequantize, quantize_rows


@dataclass(frozen=True, slots=True, eq=False)
class Float8Rows:
    """A matrix of float8 ``values`` [R, C] with a float32 ``scale`` [R]: of weights, or of activations."""

    values: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        assert self.values.dtype == FLOAT8, self.values.dtype
        assert self.values.shape[:-1] == self.scale.shape, (self.values.shape, self.scale.shape)

    @classmethod
    def of(cls, rows_RC: torch.Tensor) -> Float8Rows:
        """Quantised rows."""
        return cls(*quantize_rows(rows_RC))

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Float8Rows:
        """Rows to be written."""
        scale = torch.empty(rows, dtype=torch.float32, device=device)
        return cls(torch.empty(rows, width, dtype=FLOAT8, device=device), scale)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | torch.Tensor) -> Float8Rows:
        """A view of a slice, or copies of the rows with these indices; as bytes, for which all devices can do both."""
        return Float8Rows(self.values.view(torch.uint8)[rows].view(FLOAT8), self.scale[rows])

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def wide(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix that the values and scales stand for, rounded once."""
        return dequantize(self.values, self.scale, dtype)


Rows = torch.Tensor | Float8Rows  # of activations
