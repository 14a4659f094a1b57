"""Queues, calls and replies, with an engine and a clock of our own: nothing here waits for time to pass."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prefill.core import AtomicResult
from moe_prefill.errors import WorkerError
from moe_prefill.server.fairqueue import FairQueue, make_work
from moe_prefill.server.pace import Pace
from moe_prefill.server.refusals import Refused
from moe_prefill.server.scheduler import Call, Policy, Scheduler

from .helpers import Clock, FakeEngine, request


def work_of(*lengths, tenant="", seed=0):
    work, _ = make_work([request(length, seed * 1000 + index) for index, length in enumerate(lengths)], tenant)
    return work


def scheduler_of(clock=None, engine=None, **policy):
    clock = clock or Clock()
    engine = engine or FakeEngine(clock=clock)
    scheduler = Scheduler(engine, Policy(**{"max_queue_tokens": 10_000, **policy}), clock=clock)
    scheduler.state = "ready"  # without its thread: tests take the steps
    return scheduler, clock, engine


def run_all(scheduler, clock):
    calls = []
    while (call := scheduler.decide()) is not None:
        if isinstance(call, Call):
            scheduler.run(call)
            calls.append(call)
        else:
            clock.now_s += call
    return calls


def test_the_oldest_goes_first_and_one_call_takes_what_is_there():
    scheduler, clock, _engine = scheduler_of(max_wait_s=0)
    works = [work_of(10, seed=seed) for seed in range(5)]
    for work in works:
        scheduler.submit(work)
    (call,) = run_all(scheduler, clock)
    assert [part.work for part in call.parts] == works
    assert all(work.reply.done() for work in works)


def test_a_call_waits_for_more_but_not_longer_than_it_may():
    scheduler, clock, _ = scheduler_of(max_wait_s=0.5)
    scheduler.submit(work_of(10))
    assert scheduler.decide() == pytest.approx(0.5)
    clock.now_s += 0.3
    scheduler.submit(work_of(10, seed=1))
    assert scheduler.decide() == pytest.approx(0.2), "the oldest has waited already"
    clock.now_s += 0.2
    call = scheduler.decide()
    assert isinstance(call, Call)
    assert len(call.parts) == 2


def test_a_full_call_waits_for_nothing():
    scheduler, _clock, engine = scheduler_of(max_wait_s=10)
    engine.limits = engine.limits.__class__(max_request_tokens=100, max_sweep_tokens=50, vocab_size=512)
    scheduler.submit(work_of(60))
    assert isinstance(scheduler.decide(), Call)


def test_a_call_carries_what_the_engine_does_in_its_seconds():
    scheduler, clock, _engine = scheduler_of(max_wait_s=0, max_sweep_s=0.1)  # 100 tokens at 1000 a second
    scheduler.submit(work_of(50))
    run_all(scheduler, clock)
    for seed in range(10):
        scheduler.submit(work_of(30, seed=seed))
    calls = run_all(scheduler, clock)
    assert [call.tokens for call in calls] == [90, 90, 90, 30]


def test_small_calls_do_not_make_calls_small():
    """A call of one short request takes as long as a hundred of them: its rate is no bound."""

    class Slow(FakeEngine):
        def score(self, requests):
            self._clock.now_s += 0.05
            return super().score(requests)

    clock = Clock()
    engine = Slow(clock=clock, tokens_per_s=10_000.0, max_sweep=10**5)
    scheduler, clock, engine = scheduler_of(clock, engine, max_wait_s=0, max_sweep_s=1.0, max_queue_tokens=10**6)
    for seed in range(20):
        scheduler.submit(work_of(10, seed=seed))
        run_all(scheduler, clock)
    for seed in range(400):
        scheduler.submit(work_of(200, seed=seed))
    sizes = [call.tokens for call in run_all(scheduler, clock)]
    assert max(sizes) == pytest.approx(9500, rel=0.05), "0.05 s and 9500 tokens make one second"
    assert len(sizes) < 15


def test_work_larger_than_a_call_is_cut_and_answered_once_in_its_order():
    scheduler, clock, engine = scheduler_of(max_wait_s=0, max_sweep_s=0.1)
    scheduler.submit(work_of(50))
    run_all(scheduler, clock)
    requests = [request(40, seed) for seed in range(7)]
    work, places = make_work(requests)
    scheduler.submit(work)
    calls = run_all(scheduler, clock)
    assert [call.num_requests for call in calls] == [2, 2, 2, 1]
    answers = work.reply.result(0)
    expected = engine.score(requests)
    for place, want in zip(places, expected, strict=True):
        assert answers[place].logits.tolist() == want.logits.tolist()


def test_siblings_cost_what_they_add():
    long = request(100)
    first, second = long.tokens.copy(), long.tokens.copy()
    second[-1] ^= 1
    siblings = [type(long).candidates(tokens, [1]) for tokens in (first, second)]
    assert sorted(make_work(siblings)[0].costs) == [1, 100]


def test_calls_of_batches_are_small_while_interactive_requests_come():
    scheduler, clock, _ = scheduler_of(max_wait_s=0, batch_sweep_s=0.5, interactive_wait_s=0.1)  # at 1000 tokens/s

    def batch(count):
        scheduler.submit(work_of(*[19] * count), "batch")

    def sizes():
        return [(call.lane, call.num_requests) for call in run_all(scheduler, clock)]

    batch(1)
    run_all(scheduler, clock)  # the speed is known now
    batch(60)
    assert sizes() == [("batch", 26), ("batch", 26), ("batch", 8)]
    scheduler.submit(work_of(30))
    batch(15)
    assert sizes() == [("interactive", 1), ("batch", 5), ("batch", 5), ("batch", 5)]
    clock.now_s += 4.0
    batch(15)
    assert sizes() == [("batch", 5)] * 3, "the last one came less than five seconds ago"
    clock.now_s += 5.0
    batch(15)
    assert sizes() == [("batch", 15)]


def test_a_batch_beside_interactive_requests_is_never_in_larger_calls_than_alone():
    scheduler, _, _ = scheduler_of(batch_sweep_s=0.02, interactive_wait_s=0.1)
    assert scheduler.paces["beside"].call_s == scheduler.paces["batch"].call_s == pytest.approx(0.02)


def test_calls_do_not_shrink_to_nothing_where_every_call_takes_longer_than_asked():
    """As where weights are streamed: a second for whatever is computed, and one for 1000 tokens."""
    pace = Pace(0.05)
    pace.fixed_s = 1.0
    pace.add(64, 1.064)
    for _ in range(50):
        tokens = pace.call_tokens
        pace.add(tokens, 1.0 + tokens / 1000)
    assert pace.call_tokens == pytest.approx(1000, rel=0.05), "half of the time is for tokens"


def test_batches_run_only_when_nothing_interactive_waits():
    scheduler, clock, _ = scheduler_of(max_wait_s=0)
    scheduler.submit(work_of(10, seed=1), "batch")
    scheduler.submit(work_of(10, seed=2))
    assert [call.lane for call in run_all(scheduler, clock)] == ["interactive", "batch"]


def test_a_full_queue_refuses_and_says_when_to_come_back():
    scheduler, clock, _ = scheduler_of(max_queue_tokens=100, max_wait_s=0)
    scheduler.submit(work_of(60))
    with pytest.raises(Refused) as refused:
        scheduler.submit(work_of(60, seed=1))
    assert refused.value.status == 429
    assert refused.value.retry_after_s >= 1
    run_all(scheduler, clock)
    scheduler.submit(work_of(60, seed=1))


def test_what_never_fits_is_refused_for_good():
    scheduler, _, _ = scheduler_of(max_queue_tokens=100)
    with pytest.raises(Refused) as refused:
        scheduler.submit(work_of(101))
    assert refused.value.status == 413


def test_a_tenant_fills_its_share_only_and_waits_its_turn():
    scheduler, clock, _ = scheduler_of(max_queue_tokens=1000, tenant_share=0.5, max_wait_s=0, max_sweep_s=0.1)
    scheduler.submit(work_of(100, tenant="warm"))
    run_all(scheduler, clock)
    for seed in range(5):
        scheduler.submit(work_of(100, tenant="loud", seed=seed))
    with pytest.raises(Refused) as refused:
        scheduler.submit(work_of(100, tenant="loud", seed=9))
    assert refused.value.status == 429
    scheduler.submit(work_of(100, tenant="quiet"))
    order = [call.parts[0].work.tenant for call in run_all(scheduler, clock)]
    assert order.index("quiet") <= 1, "five requests of one tenant do not stand before another's first"


def test_who_no_longer_waits_is_not_computed():
    scheduler, clock, engine = scheduler_of(max_wait_s=0)
    left, stays = work_of(10, seed=1), work_of(10, seed=2)
    scheduler.submit(left)
    scheduler.submit(stays)
    left.reply.cancel()
    run_all(scheduler, clock)
    assert sum(map(len, engine.calls)) == 1
    assert len(stays.reply.result(0)) == 1
    assert scheduler.queued("interactive") == (0, 0)


@pytest.mark.parametrize("limits", [{"max_queue_tokens": 100}, {"max_queue_requests": 2}, {"tenant_share": 0.5}])
def test_who_no_longer_waits_takes_no_room_from_others(limits):
    scheduler, clock, _ = scheduler_of(max_wait_s=0, **{"max_queue_tokens": 200, **limits})
    stays, *left = (work_of(50, tenant="a", seed=seed) for seed in range(2))
    for work in (stays, *left):
        scheduler.submit(work)
    with pytest.raises(Refused):
        scheduler.submit(work_of(60, tenant="a", seed=9))
    for work in left:
        work.reply.cancel()
    comes = work_of(50, tenant="a", seed=10)
    scheduler.submit(comes)
    assert scheduler.queued("interactive") == (2, 100)
    run_all(scheduler, clock)
    assert len(stays.reply.result(0)) == len(comes.reply.result(0)) == 1


def test_a_failing_call_answers_with_its_error_and_the_next_one_runs():
    scheduler, clock, engine = scheduler_of(max_wait_s=0)
    engine.fail_with = RuntimeError("broken")
    work = work_of(10)
    scheduler.submit(work)
    run_all(scheduler, clock)
    assert [type(answer) for answer in work.reply.result(0)] == [RuntimeError]
    engine.fail_with = None
    again = work_of(10)
    scheduler.submit(again)
    run_all(scheduler, clock)
    assert isinstance(again.reply.result(0)[0], AtomicResult)


def test_a_lost_engine_answers_everyone_and_takes_nothing_more():
    scheduler, clock, engine = scheduler_of(max_wait_s=0, max_sweep_s=0.05)
    scheduler.submit(work_of(50))
    run_all(scheduler, clock)
    engine.fail_with = WorkerError("gone")
    works = [work_of(40, seed=seed) for seed in range(3)]
    for work in works:
        scheduler.submit(work)
    scheduler.run(scheduler.decide())
    assert isinstance(works[0].reply.result(0)[0], WorkerError)
    for work in works[1:]:
        with pytest.raises(Refused):
            work.reply.result(0)
    with pytest.raises(Refused) as refused:
        scheduler.submit(work_of(1))
    assert (refused.value.status, scheduler.state) == (503, "failed")


def test_drain_finishes_what_is_queued_and_refuses_what_comes():
    scheduler = Scheduler(FakeEngine(), Policy(max_queue_tokens=10_000))
    scheduler.start()
    works = [work_of(10, seed=seed) for seed in range(20)]
    for work in works:
        scheduler.submit(work)
    assert scheduler.drain(30) == 0
    assert all(len(work.reply.result(0)) == 1 for work in works)
    with pytest.raises(Refused):
        scheduler.submit(work_of(1))
    scheduler.close()


def test_ten_thousand_queued_at_the_end_get_one_reply_each():
    engine = FakeEngine()
    engine.gate.clear()
    scheduler = Scheduler(engine, Policy(max_queue_tokens=10**9, max_queue_requests=20_000, max_wait_s=0))
    scheduler.start()
    works = [work_of(10, seed=seed) for seed in range(10_000)]
    replies = []
    for work in works:
        work.reply.add_done_callback(replies.append)
        scheduler.submit(work)
    left = scheduler.drain(0)  # the engine stands still: whatever it did not begin is given back
    engine.gate.set()
    scheduler.close()
    assert len(replies) == len(works)
    refused = [work for work in works if work.reply.exception(0) is not None]
    assert len(refused) == left > 5000
    assert {work.reply.exception(0).status for work in refused} == {503}


def test_many_threads_submit_and_everyone_gets_their_own_answer():
    engine = FakeEngine()
    scheduler = Scheduler(engine, Policy(max_queue_tokens=10**9, max_queue_requests=10**6, max_wait_s=0))
    scheduler.start()
    wrong = []

    def client(seed):
        for number in range(50):
            asked = [request(5 + number % 7, seed * 100 + number), request(9, seed * 100 + number)]
            work, places = make_work(asked)
            scheduler.submit(work)
            answers = work.reply.result(30)
            for place, want in zip(places, asked, strict=True):
                if answers[place].logits.tolist() != engine._one(want).logits.tolist():
                    wrong.append((seed, number))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.close()
    assert not wrong


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["push", "take", "cancel", "drop"]),
        st.integers(0, 2),
        st.lists(st.integers(1, 60), min_size=1, max_size=4),
    ),
    max_size=40,
)


@given(STEPS)
def test_every_request_leaves_the_queue_exactly_once(steps):
    queue, pushed, taken = FairQueue(), [], {}
    for number, (step, tenant, sizes) in enumerate(steps):
        if step == "push":
            work = work_of(*sizes, tenant=str(tenant), seed=number)
            pushed.append(work)
            queue.push(work)
        elif step == "cancel" and pushed:
            pushed[number % len(pushed)].reply.cancel()
        elif step == "drop":
            queue.drop_cancelled()
            assert not any(work.reply.cancelled() for _, _, work in queue._heap)
        else:
            parts = queue.take(sizes[0])
            total = sum(sum(part.work.costs[part.start : part.end]) for part in parts)
            assert total <= sizes[0] or (len(parts) == 1 and parts[0].end - parts[0].start == 1)
            for part in parts:
                assert part.start == taken.get(id(part.work), 0)
                taken[id(part.work)] = part.end
        waiting = [work for _, _, work in queue._heap]
        assert queue.tokens == sum(sum(work.costs[work.given :]) for work in waiting)
        assert queue.tokens == sum(queue.tenant_tokens.values())
    while queue:
        for part in queue.take(100):
            taken[id(part.work)] = part.end
    for work in pushed:
        assert work.reply.cancelled() or taken[id(work)] == len(work.requests)
    assert queue.tokens == 0
