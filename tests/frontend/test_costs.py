"""The closed form of a request's cost against the cost model, and the books."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.core import AtomicRequest
from moe_prefill.costmodel import Batch, Rows, batch_flops, predict_sweep
from moe_prefill.forest import SHARE_EVERYTHING, SHARE_NOTHING
from moe_prefill.frontend import Load, RequestCosts, make_ticket
from tests.costmodel.models import machine_profile, specs
from tests.frontend.helpers import HASHER, machine, rng_tokens, ticket


def costs_of(spec):
    return RequestCosts(spec, machine_profile(), precision="float32", sweep_tokens=512, rule=SHARE_EVERYTHING)


@given(specs, st.integers(2, 120), st.data())
@settings(max_examples=60, deadline=None)
def test_flops_are_those_of_the_cost_model(spec, length, data):
    rng = np.random.default_rng(length)
    if data.draw(st.booleans()):
        request = AtomicRequest.continuation(rng_tokens(rng, length), data.draw(st.integers(1, length - 1)))
    else:
        request = AtomicRequest.candidates(rng_tokens(rng, length), [1, 2, 3])
    made = make_ticket(request, HASHER, id=0, vocab_size=spec.vocab_size)
    whole = Batch.from_requests([request], [""], SHARE_NOTHING, spec.vocab_size)
    assert costs_of(spec).of(made, 0).flops == batch_flops(spec, whole)
    begin = data.draw(st.integers(0, made.first_asked))
    rest = Batch(Rows.of(begin, made.num_tokens - begin), whole.carried, whole.asked_rows, whole.head_rows)
    assert costs_of(spec).of(made, begin).flops == batch_flops(spec, rest)


def test_bookings_of_siblings_add_up_to_their_sweep():
    it, rng = machine(), np.random.default_rng(0)
    shared = rng_tokens(rng, 64)
    made = [ticket(np.concatenate([shared, [i], rng_tokens(rng, 30)]), i) for i in range(5)]
    booked = it.costs.of(made[0], 0).flops + sum(it.costs.of(each, 64).flops for each in made[1:])
    batch = Batch.from_requests([each.request for each in made], [""] * 5, SHARE_EVERYTHING, 97)
    assert booked == batch_flops(it.spec, batch)


def test_predicted_time_is_that_of_a_share_of_a_full_sweep():
    it = machine()
    costs = RequestCosts(it.spec, it.profile, precision="float32", sweep_tokens=4096, rule=it.rule)
    sweep = predict_sweep(it.spec, Batch.uniform(4096, 512), it.profile, precision="float32")
    one = costs.range(0, 512, 511, 1, 2)
    assert 8 * one.ns == pytest.approx(1e9 * sweep.compute_s, rel=0.05)


operations = st.tuples(st.sampled_from(["start", "progress", "finish", "cancel"]), st.integers(0, 7))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.lists(operations, max_size=20))
def test_the_load_of_an_idle_worker_is_exactly_zero(lengths, steps):
    it, load = machine(), Load()
    waiting, running, booked = [], {}, 0
    for id, length in enumerate(lengths):
        made = ticket(range(length), id)
        load.book(made, it.costs.of(made, 0))
        booked += it.costs.of(made, 0).flops
        waiting.append(id)
    assert load.flops == load.waiting_flops == booked
    for number, (step, part) in enumerate(steps):
        which = list(running)[part % len(running)] if running else None
        if step == "start" and waiting:
            load.start(number, waiting[: part + 1])
            running[number], waiting = waiting[: part + 1], waiting[part + 1 :]
        elif step == "progress" and running:
            before = load.flops
            load.progress(which, part, 7)
            assert 0 <= load.flops <= before
        elif step == "finish" and running:
            assert load.finish(which) == running.pop(which)
        elif step == "cancel" and waiting:
            load.cancel(waiting.pop())
        assert (load.waiting, load.running) == (len(waiting), sum(map(len, running.values())))
    for number in running:
        load.finish(number)
    for id in waiting:
        load.cancel(id)
    assert (load.flops, load.ns, load.tokens, load.waiting, load.running) == (0, 0, 0, 0, 0)
    assert load.idle
