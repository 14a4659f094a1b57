"""T follows what the workers wait for their banks."""

import logging
import random

import numpy as np

from moe_prefill.frontend import Limits, Threshold, make_policy
from moe_prefill.frontend.frontend import Frontend
from tests.frontend.helpers import families, machine, rng_tokens, tickets


def sweep(threshold, flops, exposed, count=1):
    """``count`` sweeps of a second each, ``exposed`` of it waited; whether T changed in any."""
    changed = [threshold.observe(flops, 1.0, exposed) for _ in range(count)]
    return any(changed)


def test_sweeps_at_t_that_wait_more_than_a_hundredth_raise_it_to_what_would_have_hidden_it():
    threshold = Threshold(1000, 10_000)
    assert not sweep(threshold, 1000, 0.2, 2), "too few to conclude anything"
    assert sweep(threshold, 1000, 0.2)
    assert 1000 / 0.8 <= threshold.flops <= 1.2 * 1000 / 0.8


def test_less_than_a_hundredth_raises_nothing_and_nor_do_sweeps_below_t():
    threshold = Threshold(1000, 10_000)
    assert not sweep(threshold, 1000, 0.009, 50)
    assert not sweep(threshold, 999, 0.9, 50)
    assert threshold.flops == 1000


def test_one_bad_sweep_among_many_is_no_drift():
    threshold = Threshold(1000, 10_000)
    sweep(threshold, 1000, 0.0, 7)
    assert not sweep(threshold, 1000, 0.07)
    assert threshold.flops == 1000


def test_it_falls_back_slowly_and_never_below_the_plan():
    threshold = Threshold(1000, 10_000)
    sweep(threshold, 1000, 0.5, 3)
    high = threshold.flops
    sweep(threshold, high, 0.0, 10)
    assert 0.9 * high <= threshold.flops < high, "a percent a sweep"
    sweep(threshold, high, 0.0, 1000)
    assert threshold.flops == 1000


def test_memory_bounds_it(caplog):
    threshold = Threshold(1000, 1500)
    with caplog.at_level(logging.WARNING):
        sweep(threshold, 1500, 0.9, 3)
        sweep(threshold, 1500, 0.9, 30)
    assert threshold.flops == 1500
    assert len(caplog.records) == 1, "at its bound there is nothing new to say"
    assert "the largest sweep that memory allows" in caplog.text
    assert Threshold(3000, 1500).flops == 1500


def test_rise_and_fall_are_said(caplog):
    threshold = Threshold(1000, 10_000)
    with caplog.at_level(logging.INFO):
        sweep(threshold, 1000, 0.3, 3)
        sweep(threshold, 5000, 0.0, 500)
    said = [record.getMessage() for record in caplog.records]
    assert "T rises from 1000 to" in said[0]
    assert "waited 30.0% of their time" in said[0]
    assert said[-1] == "T is back at 1000 FLOPs a sweep (planned 1000)"
    assert len(said) <= 8


def test_on_a_machine_whose_copies_slow_down_it_settles_where_they_are_hidden():
    """Sweeps at T compute as long as T takes; copies take as long as 1,800 FLOPs, then 1,200 again."""
    threshold, chance = Threshold(1200, 10_000), random.Random(0)
    for copies in [1800] * 60 + [1200] * 400:
        compute = threshold.flops * chance.uniform(1.0, 1.1)
        seconds = max(compute, copies)
        threshold.observe(int(compute), seconds, seconds - compute)
        if copies == 1800:
            most = threshold.flops
    assert 1800 / 1.1 <= most <= 1.25 * 1800
    assert threshold.flops == 1200


def test_policies_and_sweeps_follow_t():
    it = machine()
    frontend = Frontend(1, make_policy("paper", it.costs, it.limits), it.costs, it.bounds, it.admission)
    for ticket in tickets([rng_tokens(np.random.default_rng(i), 60) for i in range(200)]):
        frontend.submit(ticket)
    given = frontend.route()
    frontend.saturate(Limits(saturated=2 * it.limits.saturated, full=it.limits.full))
    assert frontend.route() > given / 2
    assert frontend.bounds.least_flops == 2 * it.limits.saturated


def test_cancelled_requests_leave_nothing_behind():
    it = machine()
    frontend = Frontend(2, make_policy("ours", it.costs, it.limits), it.costs, it.bounds, it.admission)
    made = tickets(families(np.random.default_rng(0), 20, 5, 64, 40))
    for ticket in made:
        frontend.submit(ticket)
    frontend.cancel(made[0].id)  # in the queue
    assert 0 < frontend.route() < len(made)
    waiting = list(frontend._tickets)[:10]
    for id in waiting:
        frontend.cancel(id)
    done = []
    while not frontend.idle:
        frontend.route()
        for worker in (0, 1):
            formed = frontend.next_sweep(worker, float("inf"))
            if formed is not None:
                frontend.cancel(formed.tickets[0].id)  # it runs, and is answered all the same
                done += [ticket.id for ticket in frontend.finished(formed.number)]
    assert sorted(done) == sorted({t.id for t in made} - set(waiting) - {made[0].id})
    for worker in frontend.workers:
        assert (worker.load.flops, worker.load.ns, worker.load.tokens, worker.load.waiting) == (0, 0, 0, 0)
        assert not worker.table.pending
