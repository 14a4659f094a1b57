"""The clock of single operations and the ceilings beside it."""

import torch

from moe_prefill.bench.ceilings import Ceilings, Clock
from tests.conftest import DEVICE


def test_the_clock_runs_the_work_and_ceilings_are_rates():
    calls = []
    clock = Clock(DEVICE)
    x = torch.ones(64, 64, device=DEVICE)
    assert clock.seconds(lambda: calls.append(None) or x.add(1)) > 0
    assert len(calls) >= 3  # twice to warm up
    ceilings = Ceilings(clock)
    first = ceilings.flops
    ceilings.again()
    assert 0 < ceilings.flops <= first
    assert ceilings.bytes_per_s(1 << 20) == ceilings.bytes_per_s(1 << 20) > 0  # measured once
