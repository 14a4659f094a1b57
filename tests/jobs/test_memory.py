"""Peak memory does not grow with the number of rows."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_table

DRIVER = Path(__file__).with_name("memory_driver.py")
FEW, MANY = 12_000, 120_000
ROOM = 24 * 2**20  # the larger table is 40 MB of text and more than twice that as Python objects


def peak_bytes(source: Path, output: Path) -> int:
    # Allocators that keep freed blocks for later, one pool a thread, would blur what the job itself holds.
    calm = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(source), str(output)], check=True, capture_output=True, text=True, env=calm
    )
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize(("kind", "output_kind"), [("csv", "csv"), ("jsonl", "parquet"), ("parquet", "jsonl")])
def test_ten_times_the_rows_need_the_same_memory(tmp_path: Path, kind: str, output_kind: str) -> None:
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghij", k=9)) for _ in range(3000)]
    table = [{"id": str(i), "text": " ".join(chance.choices(words, k=34))} for i in range(MANY)]
    peaks = []
    for count in (FEW, MANY):
        source = write_table(tmp_path / f"in-{count}.{kind}", table[:count], row_group_size=4_000)
        peaks.append(peak_bytes(source, tmp_path / f"out-{count}.{output_kind}"))
    assert (tmp_path / f"in-{MANY}.{kind}").stat().st_size > 15 * 2**20
    assert peaks[1] - peaks[0] < ROOM, peaks
