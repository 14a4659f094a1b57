"""Who gets what: the paper's rule, ours, those of other systems; admission; loss of a worker."""

import numpy as np
import pytest

from moe_prefill.blocks import BlockChange, BlockEvents
from moe_prefill.costmodel import Batch, batch_flops
from moe_prefill.errors import Overloaded, RowError
from moe_prefill.forest import SHARE_NOTHING
from moe_prefill.frontend import POLICIES, Admission, Extensions, Frontend, Limits, LookAhead, Ours, ShortestFirst
from moe_prefill.frontend import make_policy as make
from tests.frontend.helpers import RULE, families, machine, rng_tokens, ticket, tickets

RNG = np.random.default_rng(1)


def frontend(policy, workers=3, **changes):
    it = machine(**changes)
    made = make(policy, it.costs, it.limits) if isinstance(policy, str) else policy(it)
    return Frontend(workers, made, it.costs, it.bounds, it.admission)


def submit_all(front, made):
    for each in made:
        front.submit(each)
    front.route()


def tickets_from(first, sequences):
    return [ticket(sequence, first + place) for place, sequence in enumerate(sequences)]


def owners(front):
    return {t.id: w.index for w in front.workers for t in w.waiting._by_age.values()}


def test_the_papers_round():
    """No match: least load. Then the longest match, pending or committed, below T; ties by load."""
    shared = rng_tokens(RNG, 64)
    front = frontend("paper")
    made = tickets([np.concatenate([shared, [2]]), rng_tokens(RNG, 40), np.concatenate([shared, [3]])])
    submit_all(front, made)
    assert owners(front) == {0: 0, 1: 1, 2: 0}
    stored = BlockChange("stored", made[0].chain[:3])
    front.workers[2].table.apply(BlockEvents(worker=2, generation=0, number=0, changes=(stored,)))
    submit_all(front, [ticket(np.concatenate([shared[:50], [5]]), 3)])
    assert owners(front)[3] == 2, "as long a match as worker 0's, and less load"


def test_the_papers_workers_are_saturated_by_t_and_the_rest_waits():
    front = frontend("paper")
    made = tickets([rng_tokens(RNG, 100) for _ in range(60)])
    submit_all(front, made)
    limit = machine().limits.saturated
    last = machine().costs.of(made[0], 0).flops
    assert all(limit <= w.load.flops <= limit + last for w in front.workers)
    assert front.queued == 60 - sum(len(w.waiting) for w in front.workers) > 0
    sweep = front.next_sweep(0, 0.0)
    front.progress(sweep.number, 1, 2)
    assert front.route() > 0
    assert front.workers[0].load.flops >= limit


def test_other_policies_hand_on_at_once():
    for policy in ("round-robin", "vllm", "least-tokens", "sglang"):
        front = frontend(policy)
        submit_all(front, tickets([rng_tokens(RNG, 100) for _ in range(60)]))
        assert front.queued == 0
        assert {len(w.waiting) for w in front.workers} == {20}


def test_vllm_counts_waiting_four_times():
    front = frontend("vllm", workers=2)
    submit_all(front, tickets([rng_tokens(RNG, 20) for _ in range(4)]))
    front.next_sweep(0, np.inf)  # two of worker 0 run (score 2), two of worker 1 wait (score 8)
    submit_all(front, [ticket(rng_tokens(RNG, 20), 4)])
    assert owners(front)[4] == 0


def test_sglang_follows_a_prefix_of_more_than_half_until_counts_differ_too_much():
    shared = rng_tokens(RNG, 64)
    front = frontend("sglang", workers=2)
    submit_all(front, tickets([np.concatenate([shared, rng_tokens(RNG, 20)]) for _ in range(60)]))
    counts = [len(w.waiting) for w in front.workers]
    assert max(counts) - min(counts) == 32, "the bound that its rule allows"


def test_siblings_that_arrive_apart_meet():
    made = tickets(families(np.random.default_rng(3), 12, 6, 96, 20))
    front = frontend("ours")
    submit_all(front, made)
    by_prefix: dict[bytes, set[int]] = {}
    for id, worker in owners(front).items():
        by_prefix.setdefault(made[id].chain[5], set()).add(worker)
    assert front.queued == 0
    assert all(len(workers) == 1 for workers in by_prefix.values())


def test_each_extension_off_leaves_the_papers_rule():
    off = Extensions(look_ahead=False, memory_bound=False, together=0, spill=False)
    made = tickets(families(np.random.default_rng(4), 20, 4, 96, 20))
    fronts = [frontend("paper"), frontend(lambda it: Ours(it.costs, it.limits, off))]
    for front in fronts:
        submit_all(front, made)
    assert owners(fronts[0]) == owners(fronts[1])


def all_of(queue):
    return [queue.pop() for _ in range(len(queue))]


def test_long_requests_come_first_and_an_epoch_ends_when_enough_is_new():
    it = machine()
    short, long, late = (ticket(rng_tokens(RNG, n), id) for id, n in enumerate((30, 300, 900)))
    for renew, expected in ((False, [short, late]), (True, [late, short])):
        queue = LookAhead(it.costs, postpone=False, renew=renew)
        queue.push(short)
        queue.push(long)
        assert queue.pop() is long
        queue.push(late)
        assert all_of(queue) == expected
        assert queue.remaining_ns == 0


def test_siblings_of_what_waits_join_it():
    shared = rng_tokens(RNG, 200)
    first, other, later = (
        ticket(tokens, id)
        for id, tokens in enumerate((np.append(shared, 2), rng_tokens(RNG, 150), np.append(shared, 3)))
    )
    longest = ticket(rng_tokens(RNG, 900), 3)
    queue = LookAhead(machine().costs, postpone=False)
    for each in (first, other, longest):
        queue.push(each)
    assert queue.pop() is longest
    queue.push(later)
    assert all_of(queue) == [first, later, other]


def test_long_ones_wait_while_more_comes_than_is_computed_but_for_what_evens_loads_out():
    """Before anything shows that more will come, the longest are first. Once it has come and work is left over, the
    shorter ones go before them, and as much of the shortest is kept for the end as two times the longest.
    """
    made = tickets([rng_tokens(RNG, n) for n in (50,) * 40 + (100, 200, 400, 500)])
    for postpone in (False, True):
        queue = LookAhead(machine().costs, postpone=postpone)
        for each in made[:-1]:
            queue.push(each)
        assert queue.pop().num_tokens == 400
        queue.push(made[-1])
        for each in tickets_from(100, [rng_tokens(RNG, 50) for _ in range(8)]):
            queue.push(each)
        lengths = [each.num_tokens for each in all_of(queue)]
        if not postpone:
            assert lengths == sorted(lengths, reverse=True)
            continue
        longest = lengths.index(500)
        assert lengths[:longest] == sorted(lengths[:longest])
        assert 100 in lengths[:longest]
        assert 200 in lengths[:longest]
        assert 1000 <= sum(lengths[longest + 1 :]) <= 1200


def test_what_a_pool_holds_comes_before_what_would_push_it_out():
    front = frontend("ours")
    held, other = (ticket(rng_tokens(RNG, n), id) for id, n in enumerate((100, 300)))
    stored = BlockChange("stored", held.chain[:4])
    front.workers[1].table.apply(BlockEvents(worker=1, generation=0, number=0, changes=(stored,)))
    for held_first, first in ((True, [held, other]), (False, [other, held])):
        queue = LookAhead(machine().costs, held_first=held_first)
        queue.push(held)
        queue.push(other)
        queue.peek(front.workers)
        assert [queue.pop(), queue.pop()] == first


def test_the_shortest_comes_first_and_a_sibling_of_a_taken_one_is_short():
    it = machine()
    queue = ShortestFirst(it.costs)
    shared = rng_tokens(RNG, 160)
    made = tickets([rng_tokens(RNG, 150), np.append(shared, 2), rng_tokens(RNG, 170), np.append(shared, 3)])
    for each in made:
        queue.push(each)
    assert [queue.pop().id for _ in range(4)] == [0, 1, 3, 2]
    assert (len(queue), queue.remaining_ns) == (0, 0)


def test_a_request_that_fits_no_worker_is_refused_with_the_numbers():
    front = frontend("ours")
    with pytest.raises(RowError, match=r"2049 tokens; no worker can compute more than 2048") as refused:
        front.submit(ticket(np.zeros(2049), 0))
    assert refused.value.code == "too_long"
    front.submit(ticket(np.zeros(2048), 1))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_queue_refuses_with_the_predicted_backlog(policy):
    it = machine()
    front = Frontend(
        2, make(policy, it.costs, it.limits), it.costs, it.bounds, Admission(max_request_tokens=99, max_queued=3)
    )
    for each in tickets([rng_tokens(RNG, 90) for _ in range(3)]):
        front.submit(each)
    with pytest.raises(Overloaded, match="3 requests are queued") as refused:
        front.submit(ticket(rng_tokens(RNG, 90), 3))
    predicted_s = 3 * it.costs.of(ticket(rng_tokens(RNG, 90), 4), 0).ns / 1e9 / 2
    assert refused.value.retry_after_s == pytest.approx(predicted_s)
    front.route()
    front.submit(ticket(rng_tokens(RNG, 90), 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lost_worker_costs_no_request(policy):
    made = tickets(families(np.random.default_rng(5), 8, 4, 64, 20))
    front = frontend(policy)
    submit_all(front, made)
    sweep = front.next_sweep(1, np.inf)
    assert sweep is not None
    front.progress(sweep.number, 1, 3)
    mine = {id for id, worker in owners(front).items() if worker == 1} | {t.id for t in sweep.tickets}
    assert front.lost(1) == len(mine)
    assert (front.workers[1].load.flops, front.workers[1].table.pending) == (0, {})
    front.route()
    answered = []
    for _ in range(100):
        if front.idle:
            break
        sweeps = [front.next_sweep(index, np.inf) for index in (0, 1, 2)]
        assert sweeps[1] is None
        for sweep in filter(None, sweeps):
            answered += [t.id for t in front.finished(sweep.number)]
        front.route()
    assert sorted(answered) == list(range(len(made)))
    front.joined(1, 1)
    submit_all(front, [ticket(rng_tokens(RNG, 100), 100 + i) for i in range(6)])
    assert len(front.workers[1].waiting) > 0


def test_salted_tenants_never_share():
    tokens = rng_tokens(RNG, 200)
    front = frontend("ours", workers=1)
    made = [
        ticket(tokens, 0),
        ticket(tokens, 1, salt="a"),
        ticket(tokens, 2, tenant="a"),
        ticket(tokens, 3, private=True),
    ]
    submit_all(front, made)
    alone = machine().costs.of(made[0], 0).flops
    assert front.workers[0].load.flops == 4 * alone
    assert front.next_sweep(0, np.inf).forest.num_tokens == 800


def test_what_is_booked_is_what_the_forest_of_the_sweep_computes():
    """Families of every size behind prefixes of every length, in the order of the queue: some do not pay, and the first
    ones of a family are booked before it is known that it does.
    """
    rng = np.random.default_rng(6)
    sequences = [
        each for prefix in (16, 32, 64) for members in (2, 3, 8) for each in families(rng, 1, members, prefix, 40)
    ]
    made = tickets(sequences)
    front = frontend("ours", workers=1)
    for each in made:
        front.submit(each)
    front.route()
    booked = front.workers[0].load.flops
    sweep = front.next_sweep(0, np.inf)
    assert front.queued == 0
    assert len(sweep.tickets) == len(made)
    computed = batch_flops(machine().spec, Batch.from_requests([t.request for t in made], [""] * len(made), RULE, 97))
    shared = sum(machine().costs.of(each, each.usable_blocks * 16).flops for each in made)
    assert booked == pytest.approx(computed, rel=0.05)
    assert shared < 0.95 * computed, "the longest match says too little"


def test_what_is_left_in_the_queue_is_predicted_after_sharing():
    it = machine()
    made = tickets(families(np.random.default_rng(7), 6, 5, 96, 20) + families(np.random.default_rng(8), 6, 2, 16, 40))
    queue = LookAhead(it.costs)
    for each in made:
        queue.push(each)
    queue.peek()
    forest = Batch.from_requests([t.request for t in made], [""] * len(made), RULE, 97)
    alone = Batch.from_requests([t.request for t in made], [""] * len(made), SHARE_NOTHING, 97)
    expected = forest.num_tokens / alone.num_tokens * sum(it.costs.of(each, 0).ns for each in made)
    assert queue.remaining_ns == pytest.approx(expected, rel=0.02)


def test_a_worker_that_would_be_late_is_passed_over_even_if_only_it_has_room():
    """Attention makes long requests slower than their FLOPs say. Worker 0 has one, and is below the bound that the
    others have reached; what is left waits for those, unless worker 0 has nothing at all.
    """
    long, rng = ticket(rng_tokens(RNG, 1800), 0), np.random.default_rng(9)
    it = machine()
    limits = Limits(saturated=1, full=it.costs.of(long, 0).flops + 1)
    front = frontend("ours", workers=2, limits=limits)
    slow = front.workers[0]
    submit_all(front, [long])
    slow.load.ns *= 100
    submit_all(front, tickets_from(1, [rng_tokens(rng, 100) for _ in range(60)]))
    assert owners(front)[0] == 0
    assert len(slow.waiting) == 1
    assert front.queued > 0
    front.next_sweep(0, np.inf)
    slow.load.ns //= 100
    front.finished(0)
    front.route()
    assert len(slow.waiting) > 0


def test_what_a_running_sweep_will_not_store_attracts_nobody():
    prefix = rng_tokens(RNG, 320)
    twins = [ticket(np.append(prefix, [2 + id]), id) for id in range(4)]
    for kv_blocks, expected in ((0, {0}), (16, {0}), (200, {0, 20})):
        front = frontend("ours", workers=1, kv_blocks=kv_blocks)
        submit_all(front, twins[:1])
        front.next_sweep(0, np.inf)
        table = front.workers[0].table
        assert table.match(twins[1].chain, 20) in expected, "one-off blocks: all of them, or none"
        assert (table.match(twins[1].chain, 20) > 0) == (kv_blocks == 200)
        front.finished(0)
        assert not table.pending
    front = frontend("ours", workers=1, kv_blocks=16)
    submit_all(front, twins[:2])
    front.next_sweep(0, np.inf)
    assert front.workers[0].table.match(twins[2].chain, 20) == 16, "as much of what is shared as the pool holds"


def test_the_limits_are_flops_of_one_worker():
    limits = Limits(saturated=1, full=2)
    it = machine(limits=limits)
    front = Frontend(2, make("ours", it.costs, limits), it.costs, it.bounds, it.admission)
    submit_all(front, tickets([rng_tokens(RNG, 100) for _ in range(5)]))
    assert front.queued == 3
