import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prefill.bench import Cell, parse_cells
from moe_prefill.bench.timing import Timing
from moe_prefill.errors import UsageError

numbers = st.integers(1, 40)


@given(siblings=numbers, tail=numbers, prefix=numbers)
def test_a_cell_reads_what_it_writes(siblings, tail, prefix):
    cell = Cell(siblings=siblings, tail=tail, prefix=prefix)
    assert Cell.parse(str(cell)) == cell
    assert Cell.parse(str(tail)) == Cell(tail=tail)


@pytest.mark.parametrize("text", ["", "0", "-4", "8x16", "8x16@0", "0x16@8", "4k", "1.5"])
def test_other_cells_are_refused(text):
    with pytest.raises(UsageError, match="8x16@2048"):
        Cell.parse(text)


@given(siblings=numbers, tail=numbers, prefix=numbers, few=st.integers(1, 3), more=st.integers(0, 3))
def test_fewer_families_are_the_first_of_more(siblings, tail, prefix, few, more):
    cell = Cell(siblings=siblings, tail=tail, prefix=prefix)
    short, long = cell.rows(few, 1000), cell.rows(few + more, 1000)
    assert len(short) == few * siblings
    for left, right in zip(short, long, strict=False):
        assert np.array_equal(left, right)
    for first in range(0, len(long), siblings):
        assert all(np.array_equal(row[:prefix], long[first][:prefix]) for row in long[first : first + siblings])


def test_families_fill_a_sweep():
    cell = parse_cells("8x16@2048")[0]
    assert cell.families(65536) == 65536 // (2048 + 128)
    assert parse_cells("4096")[0].families(1000) == 1


def timed(runs, seconds=0.0):
    timing = Timing(seconds)
    for run in runs:
        if timing.is_done:
            break
        timing.add(run)
    return timing


def test_warm_up_ends_when_two_runs_agree():
    timing = timed([3.0, 2.0, 1.99] + [1.0] * 9)
    assert timing.warm_ups == 3
    assert timing.timed == [1.0] * 5
    assert timing.first == 3.0


def test_runs_that_never_agree_are_measured_all_the_same():
    timing = timed([float(2**i % 11 + 1) for i in range(40)])
    assert timing.warm_ups is not None
    assert len(timing.timed) >= 2


def test_few_long_runs_and_many_short_ones():
    assert len(timed([25.0] * 20).timed) == 2
    assert len(timed([4.0] * 20).timed) == 4
    assert len(timed([0.1] * 99, seconds=2.0).timed) == 20


def test_the_goal_is_known_one_run_ahead():
    timing = timed([1.0, 1.0])
    assert timing.goal == 7
