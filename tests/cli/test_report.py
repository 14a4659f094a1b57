"""The summary for people."""

from __future__ import annotations

import pytest
from rich.console import Console

from moe_prefill.cli.report import show_summary
from moe_prefill.core import RunStats
from moe_prefill.jobs import Counts, Summary


def test_lost_workers_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for restarts in (0, 2):
        stats = RunStats(restarts=restarts, recovery_s=1.25 * restarts)
        show_summary(Summary(output="out.csv", counts=Counts(), stats=stats), Console())
        told = "workers were lost and started again 2 times: 2.5 s until they were back, no row lost"
        assert (told in capsys.readouterr().out) == (restarts > 0)
