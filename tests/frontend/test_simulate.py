"""Virtual time: the promises of the router, seen over whole runs."""

import random

import numpy as np
import pytest

from moe_prefill.costmodel import Batch, Rows, Streaming, predict_sweep
from moe_prefill.frontend import POLICIES, Extensions, Ours, make_policy
from moe_prefill.residency import bank_bytes
from moe_prefill.simulate import SweepTimer, oracle_saved_tokens, simulate
from tests.frontend.helpers import families, machine, rng_tokens, tickets


def run(made, policy="ours", workers=4, watch=None, **changes):
    it = machine(**changes)
    return simulate(made, it, workers, make_policy(policy, it.costs, it.limits), watch=watch)


def mixed(seed=0, groups=40):
    rng = np.random.default_rng(seed)
    return families(rng, groups, 5, 160, 40) + [rng_tokens(rng, n) for n in rng.integers(20, 900, 60)]


@pytest.mark.parametrize("levels", ["resident", "offloaded", "hybrid"])
def test_the_timer_gives_the_seconds_of_the_cost_model(levels):
    bank = bank_bytes(machine().spec, "float32")
    it = machine(streaming=Streaming(levels=(levels,) * 3, bank_bytes=bank, depth=2, ranks=2))
    batch = Batch(Rows.of([0, 50, 50], [50, 20, 30]), Rows.of([69, 79], 1), 2, 4)
    mine = SweepTimer(it).time(batch)
    theirs = predict_sweep(it.spec, batch, it.profile, precision="float32", streaming=it.streaming)
    assert mine.compute_s == pytest.approx(theirs.compute_s)
    assert (mine.exposed_s, mine.exposed_first_s) == pytest.approx((theirs.exposed_s, theirs.exposed_first_s))
    assert mine.flops == theirs.flops


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_once_and_the_books_are_balanced(policy):
    made = tickets(mixed(), np.sort(np.random.default_rng(1).integers(0, 4, 260) / 100))
    last = {}

    def watch(simulation):
        last["it"] = simulation

    outcome = run(made, policy, watch=watch)
    assert sorted(outcome.order) == list(range(len(made)))
    assert outcome.prompt_tokens == sum(t.num_tokens for t in made)
    assert outcome.computed_tokens <= outcome.prompt_tokens
    for worker, real in zip(last["it"].frontend.workers, last["it"].workers, strict=True):
        assert (worker.load.flops, worker.load.ns, worker.load.tokens) == (0, 0, 0)
        assert worker.table.audit(list(real.pool._slots)) == []
        assert not worker.table.oddities


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_requests_give_the_same_run(policy):
    made = tickets(mixed(), np.arange(260) // 60 / 50)
    first, second = run(made, policy), run(made, policy)
    assert first == second


def test_the_plan_of_a_burst_does_not_depend_on_the_order_within_it():
    """Up to ties: the requests are the same, and each gets the same worker whatever place it has in the list."""
    sequences = mixed()
    order = list(range(len(sequences)))
    random.Random(3).shuffle(order)
    one, other = run(tickets(sequences)), run(tickets([sequences[i] for i in order]))
    assert one.computed_tokens == pytest.approx(other.computed_tokens, rel=0.02)
    assert one.makespan_s == pytest.approx(other.makespan_s, rel=0.05)


def test_work_is_shared_and_even():
    made = tickets(mixed(groups=120))
    oracle = oracle_saved_tokens(made)
    outcomes = {policy: run(made, policy) for policy in POLICIES}
    ours = outcomes["ours"]
    saved = ours.prompt_tokens - ours.computed_tokens
    assert saved >= 0.96 * oracle, "prefixes of lonely siblings do not pay by the sharing rule"
    assert all(ours.tokens_per_s >= 0.97 * other.tokens_per_s for other in outcomes.values()), "in so short a job"
    assert ours.imbalance < 1.1, "of some seven sweeps a worker"


@pytest.mark.parametrize("kv_blocks", [0, 40])
def test_bursts_that_come_faster_than_they_are_computed(kv_blocks):
    """Families, and long twins of which one comes later. Where a burst cuts a pair is luck, so the mean over seeds
    counts. sglang's rule, which hands on at once and so begins nothing long early, is up to 3% ahead here.
    """
    it = machine(kv_blocks=kv_blocks)
    gains: dict[str, list[float]] = {}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        sequences = families(rng, 40, 5, 160, 40) + families(rng, 16, 2, 900, 30) + families(rng, 150, 1, 0, 100)
        shuffled = [sequences[index] for index in rng.permutation(len(sequences))]
        made = tickets(shuffled, np.arange(len(shuffled)) * 8 // len(shuffled) / 250)
        policies = {policy: make_policy(policy, it.costs, it.limits) for policy in POLICIES}
        policies["fixed epochs"] = Ours(it.costs, it.limits, Extensions(renew=False))
        spans = {name: simulate(made, it, 2, policy).makespan_s for name, policy in policies.items()}
        for name, span in spans.items():
            gains.setdefault(name, []).append(np.log(span / spans["ours"]))
    means = {name: np.exp(np.mean(gain)) for name, gain in gains.items()}
    assert min(means.values()) >= 0.96, means
    assert means["fixed epochs"] >= 1.03, "siblings that arrive apart meet"


def test_one_hot_prefix_does_not_pin_all_work_to_one_worker():
    outcome = run(tickets(families(np.random.default_rng(0), 1, 400, 320, 40)))
    assert set(outcome.worker_of) == {0, 1, 2, 3}
    assert outcome.imbalance < 1.1


def test_a_few_requests_behind_one_prefix_use_idle_workers():
    outcome = run(tickets(families(np.random.default_rng(0), 1, 8, 64, 200)))
    assert len(set(outcome.worker_of)) == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_an_idle_worker_never_waits_while_work_is_queued(policy):
    idle = []

    def watch(simulation):
        if simulation.frontend.queued:
            idle.extend(w.index for w in simulation.workers if w.running is None)

    arrivals = np.sort(np.random.default_rng(1).integers(0, 20, 260) / 100)
    run(tickets(mixed(), arrivals), policy, watch=watch)
    assert not idle


def test_a_burst_after_idling_recovers_in_one_round():
    rng = np.random.default_rng(0)
    made = tickets([rng_tokens(rng, 200)] + [rng_tokens(rng, 200) for _ in range(80)], [0.0] + [100.0] * 80)
    busy = []

    def watch(simulation):
        if simulation.now_s == 100.0:
            busy.append([w.running is not None for w in simulation.workers])

    run(made, watch=watch)
    assert busy == [[True] * 4]


def test_no_request_is_overtaken_by_more_than_nine_fillings_of_the_queue():
    """A short request that has no sibling, in an endless stream of long siblings, which ours prefers."""
    rng, it = np.random.default_rng(0), machine()
    shared = rng_tokens(rng, 200)
    stream = [np.concatenate([shared, rng_tokens(rng, 200)]) for _ in range(800)]
    stream[50] = rng_tokens(rng, 20)
    each_s = 1.05 * it.costs.of(tickets(stream)[0], 192).ns / 1e9
    made, queued = tickets(stream, each_s * np.maximum(0, np.arange(800) - 100)), []
    given = run(made, workers=1, watch=lambda simulation: queued.append(simulation.frontend.queued))
    overtook = [id for id in given.order[: given.order.index(50)] if id > 50]
    assert 50 < max(queued) < 200
    assert 10 < len(overtook) <= 9 * max(queued)


def test_wakes_do_not_pile_up_while_less_than_t_waits():
    rng = np.random.default_rng(0)
    made = tickets([rng_tokens(rng, 20) for _ in range(30)], np.arange(30) / 10000)
    rounds = []
    outcome = run(made, workers=1, max_wait_s=0.002, watch=rounds.append)
    assert outcome.latency_s[0] >= 0.002
    assert len(rounds) < 200
