"""Which requests make a sweep."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.frontend import Frontend, WaitingRoom, make_policy
from tests.frontend.helpers import families, machine, rng_tokens, ticket, tickets


def room_of(made):
    room = WaitingRoom()
    for each in made:
        room.add(each)
    return room


def all_sweeps(made, **changes):
    it = machine(**changes)
    room, sweeps = room_of(made), []
    while len(room):
        sweeps.append(room.take(it.bounds, it.costs))
    return sweeps


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 400), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_every_request_is_in_one_sweep_and_every_sweep_fits(seed, groups, members, prefix, suffix):
    made = tickets(families(np.random.default_rng(seed), groups, members, prefix, suffix))
    sweeps = all_sweeps(made)
    assert sorted(t.id for chosen, _ in sweeps for t in chosen) == list(range(len(made)))
    assert all(forest.num_tokens <= 2048 for _, forest in sweeps)
    assert all(len(forest.tip) == len(chosen) for chosen, forest in sweeps)
    waiting = set(range(len(made)))
    for chosen, _ in sweeps:
        assert min(waiting) in {t.id for t in chosen}, "the oldest comes along"
        waiting -= {t.id for t in chosen}


def test_siblings_share_a_sweep_and_a_group_that_does_not_fit_is_not_torn():
    """Four families of 600 + 5 x 30 tokens: two make a sweep of 1,500, and a third would not fit."""
    made = tickets(families(np.random.default_rng(0), 4, 5, 600, 30))
    sweeps = all_sweeps(made)
    assert [forest.num_tokens for _, forest in sweeps] == [1500, 1500]


def test_a_group_larger_than_a_sweep_is_cut():
    made = tickets(families(np.random.default_rng(0), 1, 60, 64, 100))
    sizes = [forest.num_tokens for _, forest in all_sweeps(made)]
    assert sum(sizes) == 60 * 100 + 64 * len(sizes)
    assert len(sizes) == 4, "the fewest that can hold them"


def test_small_requests_fill_what_a_large_one_leaves():
    rng = np.random.default_rng(0)
    made = tickets([rng_tokens(rng, 1500), rng_tokens(rng, 1500), rng_tokens(rng, 300), rng_tokens(rng, 200)])
    assert [[t.id for t in chosen] for chosen, _ in all_sweeps(made)] == [[0, 2, 3][:3], [1]]


def test_a_sweep_ends_at_its_time():
    rng, it = np.random.default_rng(0), machine()
    made = tickets([rng_tokens(rng, 100) for _ in range(12)])
    one_s = it.costs.of(made[0], 0).ns / 1e9
    sweeps = all_sweeps(made, max_sweep_s=4.5 * one_s)
    assert [len(chosen) for chosen, _ in sweeps] == [4, 4, 4]
    assert len(all_sweeps(made, max_sweep_s=one_s / 100)) == 12, "one request at least"


def test_less_than_t_waits_and_is_served_anyway():
    it = replace(machine(), max_wait_s=0.5)
    front = Frontend(1, make_policy("ours", it.costs, it.limits), it.costs, it.bounds, it.admission)
    rng = np.random.default_rng(0)
    front.submit(ticket(rng_tokens(rng, 50), 0, arrival_s=10.0))
    front.route()
    assert front.wakes_at(0) == 10.5
    assert front.next_sweep(0, 10.4) is None
    for id in range(1, 40):
        front.submit(ticket(rng_tokens(rng, 50), id, arrival_s=10.1))
    front.route()
    assert front.next_sweep(0, 10.2) is not None, "now there is enough"
    front.submit(ticket(rng_tokens(rng, 50), 99, arrival_s=11.0))
    front.route()
    left = front.next_sweep(0, 11.5)
    assert left is not None
    assert front.next_sweep(0, 99.0) is None
