"""A job with a task that costs nothing, then the peak memory of this process in bytes.

python tests/jobs/memory_driver.py INPUT OUTPUT [TOKENS_OF_A_SWEEP]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from fakes import FakeTask
from helpers import run

from moe_prefill.core import AtomicRequest, AtomicResult, Column, EngineLimits, PreparedRow, RunStats

REQUEST = AtomicRequest.candidates([1, 2, 3], [4])
RESULT = AtomicResult(np.zeros(1, np.float32))


class QuickEngine:
    stats = RunStats()
    plan_digest = "quick"
    peak_flops = None

    def __init__(self, sweep_tokens: int) -> None:
        self.limits = EngineLimits(max_request_tokens=100, max_sweep_tokens=sweep_tokens, vocab_size=10)

    def score(self, requests: Any) -> list[AtomicResult]:
        return [RESULT] * len(requests)


class QuickTask(FakeTask):
    columns = (Column(name="label", kind="string"),)

    def prepare(self, rows: Any) -> Any:
        return [PreparedRow((REQUEST,))] * len(rows)

    def finish(self, prepared: PreparedRow, results: Any) -> dict[str, object]:
        return {"label": "x"}

    def notes(self, prepared: PreparedRow, results: Any) -> tuple[str, ...]:
        return ()


if __name__ == "__main__":
    source, output, *sweep_tokens = sys.argv[1:]
    engine = QuickEngine(int(sweep_tokens[0]) if sweep_tokens else 4096)
    run(Path(source), Path(output), window_rows=None, engine=engine, task=QuickTask())
    # Not getrusage: its peak can be that of the process that started this one.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(lines["VmHWM"].split()[0]) * 1024)
