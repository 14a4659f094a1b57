"""Who is given what, and when: the frontend of ranks whose progress is told."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.core import RunStats
from moe_prefill.frontend import POLICIES, make_policy
from moe_prefill.workers.dispatch import Dispatch, Lead
from tests.frontend.helpers import families, machine, rng_tokens, tickets


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


STEPS = st.lists(
    st.tuples(st.sampled_from(["submit", "cancel", "cancel", "give", "give", "done", "lost"]), st.integers(0, 10**6)),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, policy=st.sampled_from(POLICIES), schedule=st.sampled_from(["free", "rounds"]))
def test_what_is_cancelled_before_its_sweep_is_given_leaves_no_trace(steps, policy, schedule):
    """Cancelled: never in a sweep that is formed later. The rest: finished once. Books: those of the unfinished."""
    it, life = machine(), 0
    made = tickets(families(np.random.default_rng(0), 20, 4, 80, 60))
    dispatch = Dispatch(it, make_policy(policy, it.costs, it.limits), 2, schedule, Lead(depth=2, seconds=9.0))
    dispatch.joined(0, [0, 0])
    submitted, running, gone, finished = 0, [[], []], set(), []
    for step, number in [*steps, *[("give", 0), ("done", 0), ("done", 1)] * 100]:
        if step == "submit":
            for ticket in made[submitted : submitted + 10]:
                dispatch.frontend.submit(ticket)
            submitted = min(submitted + 10, len(made))
        elif step == "cancel" and submitted:
            id = made[number % submitted].id
            inside = {ticket.id for sweeps in running for _, sweep in sweeps for ticket in sweep}
            if id not in {*finished, *gone, *inside}:
                dispatch.frontend.cancel(id)
                gone.add(id)
        elif step == "give":
            for rank, score, sweep in dispatch.give(float(life), [0, 0]):
                assert not gone & {ticket.id for ticket in sweep}
                running[rank].append((score, sweep))
        elif step == "done" and running[number % 2]:
            score, _ = running[number % 2].pop(0)
            finished += [ticket.id for ticket in finish(dispatch, number % 2, score) or ()]
        elif step == "lost":
            dispatch.lost()
            life, running = life + 1, [[], []]
            dispatch.joined(life, [0, 0])
        check_books(dispatch, made)
    assert sorted(finished) == sorted({ticket.id for ticket in made[:submitted]} - gone)
    assert dispatch.idle


def check_books(dispatch, made):
    """What is booked and promised is what the requests of a worker that are not finished make."""
    for worker in dispatch.frontend.workers:
        mine = [ticket for ticket in made if worker.load.has(ticket.id)]
        assert worker.load.waiting == len(worker.waiting)
        assert worker.load.waiting + worker.load.running == len(mine)
        assert worker.load.tokens == sum(ticket.num_tokens for ticket in mine)
        assert worker.table.pending == Counter(
            digest for ticket in mine for digest in dispatch.frontend.promised(ticket)
        )
        if not mine:
            assert (worker.load.flops, worker.load.ns) == (0, 0)
