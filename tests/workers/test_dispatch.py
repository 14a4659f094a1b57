"""Who is given what, and when: the frontend of ranks whose progress is told."""

import numpy as np
import pytest

from moe_prefill.core import RunStats
from moe_prefill.frontend import make_policy
from moe_prefill.workers.dispatch import Dispatch, Lead
from tests.frontend.helpers import machine, rng_tokens, tickets


def dispatch_of(ranks=2, schedule="free", depth=2, **changes):
    it = machine(**changes)
    dispatch = Dispatch(it, make_policy("ours", it.costs, it.limits), ranks, schedule, Lead(depth=depth, seconds=9.0))
    dispatch.joined(0, [0] * ranks)
    return dispatch


def submit(dispatch, count, tokens=100):
    rng = np.random.default_rng(0)
    made = tickets([rng_tokens(rng, tokens) for _ in range(count)])
    for ticket in made:
        dispatch.frontend.submit(ticket)
    return made


def finish(dispatch, rank, score):
    return dispatch.done(rank, score.number, RunStats(busy_s=1.0), None)


def test_the_next_sweep_is_given_near_the_end_of_the_one_that_runs():
    dispatch, layers = dispatch_of(1), machine().spec.num_layers
    submit(dispatch, 100)
    ((rank, first, _),) = dispatch.give(1.0, [0])
    assert dispatch.give(1.0, [0]) == []
    assert dispatch.wait_s(1.0) is not None, "progress is looked at"
    assert dispatch.give(1.0, [1]) == [], "a third of it is done"
    ((_, second, _),) = dispatch.give(1.0, [layers])
    assert dispatch.give(1.0, [layers]) == []
    assert len(finish(dispatch, rank, first)) > 0
    assert dispatch.give(1.0, [layers]) == [], "the second one has only begun"
    assert len(finish(dispatch, rank, second)) > 0


def test_on_a_cpu_a_rank_is_given_one_sweep_at_a_time():
    dispatch, layers = dispatch_of(1, depth=1), machine().spec.num_layers
    submit(dispatch, 100)
    ((rank, score, _),) = dispatch.give(1.0, [0])
    assert dispatch.give(1.0, [layers]) == []
    finish(dispatch, rank, score)
    assert len(dispatch.give(1.0, [layers])) == 1


def test_less_than_t_wakes_in_time_and_nothing_is_polled_before():
    dispatch = dispatch_of(1, max_wait_s=0.5)
    submit(dispatch, 1)
    assert dispatch.give(0.1, [0]) == []
    assert dispatch.wait_s(0.1) == pytest.approx(0.4)
    assert len(dispatch.give(0.5, [0])) == 1
    assert dispatch.wait_s(0.5) is None


def test_in_rounds_every_rank_is_given_an_entry():
    dispatch = dispatch_of(3, "rounds")
    submit(dispatch, 1)
    given = dispatch.give(1.0, [0, 0, 0])
    assert [rank for rank, _, _ in given] == [0, 1, 2]
    assert {score.number for _, score, _ in given} == {0}
    assert sorted(len(of) for _, _, of in given) == [0, 0, 1]
    assert dispatch.give(1.0, [0, 0, 0]) == [], "nothing waits: no round"
    done = [finish(dispatch, rank, score) for rank, score, _ in given]
    assert sorted(map(str, done), key=len)[:2] == ["None", "None"]
    assert dispatch.idle


def test_a_loss_queues_everything_again_and_a_new_life_counts_from_its_own_layers():
    dispatch = dispatch_of(2)
    made = submit(dispatch, 60)
    given = dispatch.give(1.0, [0, 0])
    assert dispatch.lost() == len(given) == 2
    assert dispatch.busy() == [False, False]
    dispatch.joined(1, [7, 9])
    done = []
    counts = [7, 9]
    while not dispatch.idle:
        for rank, score, _ in dispatch.give(1.0, counts):
            counts[rank] += machine().spec.num_layers
            done += [ticket.id for ticket in finish(dispatch, rank, score)]
    assert sorted(done) == [ticket.id for ticket in made]
    assert [worker.table.generation for worker in dispatch.frontend.workers] == [1, 1]


def test_sweeps_stay_within_their_seconds_by_the_pace_that_is_seen():
    one_s = machine().costs.of(tickets([range(100)])[0], 0).ns / 1e9
    dispatch = dispatch_of(1, max_sweep_s=4.5 * one_s)
    submit(dispatch, 200)
    ((_, score, first),) = dispatch.give(1.0, [0])
    dispatch.done(0, score.number, RunStats(busy_s=8 * one_s), None)
    assert dispatch.pace == pytest.approx(2)
    ((_, _, second),) = dispatch.give(1.0, [3])
    assert (len(first), len(second)) == (4, 2)
