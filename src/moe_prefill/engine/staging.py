"""One upload a sweep: small host arrays are laid into one buffer a kind and copied to the device together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Staged:
    """A promise of a device tensor: where in which buffer the array went."""

    kind: str
    begin: int
    end: int


class Staging:
    """Collects flat int32, int64 and float32 arrays; ``upload`` moves them in one asynchronous copy a kind."""

    def __init__(self) -> None:
        self._arrays: dict[str, list[np.ndarray]] = {"int32": [], "int64": [], "float32": []}
        self._sizes = {"int32": 0, "int64": 0, "float32": 0}

    def add(self, array: np.ndarray) -> Staged:
        kind = array.dtype.name
        begin = self._sizes[kind]
        self._arrays[kind].append(array)
        self._sizes[kind] = begin + len(array)
        return Staged(kind, begin, begin + len(array))

    def upload(self, device: torch.device) -> Uploaded:
        return Uploaded(dict(self._move(device)))

    def _move(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        for kind, arrays in self._arrays.items():
            host = torch.from_numpy(np.concatenate([*arrays, np.empty(0, kind)]))
            # Pinned memory is what makes the copy asynchronous; torch keeps it until the copy is done.
            yield kind, host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@dataclass(frozen=True, slots=True)
class Uploaded:
    buffers: dict[str, torch.Tensor]

    def __getitem__(self, staged: Staged) -> torch.Tensor:
        return self.buffers[staged.kind][staged.begin : staged.end]
