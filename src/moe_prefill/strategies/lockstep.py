"""How ranks with different requests stay in step: the chunks of every rank, from two numbers of each. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class Lockstep:
    """``rows`` int64 [N, 2]: every rank's tokens in this sweep, and the rows that its last layer carries."""

    rows: Int64Array
    chunk_rows: int

    @property
    def is_over(self) -> bool:
        """No rank has a sweep left."""
        return not self.rows.any()

    def steps(self, *, last: bool) -> Int64Array:
        """Rows of every rank in every step of a layer, [steps, N]; 0 for a rank whose chunks are done."""
        chunks = [chunk_sizes(int(total), self.chunk_rows) for total in self.rows[:, int(last)]]
        table = np.zeros((max(map(len, chunks)), len(chunks)), np.int64)
        for rank, sizes in enumerate(chunks):
            table[: len(sizes), rank] = sizes
        return table


def chunk_sizes(total: int, chunk_rows: int) -> Int64Array:
    """The sizes of the chunks into which a plan cuts ``total`` rows: as few as can be, near equal."""
    count = -(-total // chunk_rows)
    return np.diff(np.arange(count + 1, dtype=np.int64) * total // max(count, 1))
