"""Engines that take two calls at once, and engines that route requests one by one, behind the scheduler."""

import threading
from concurrent.futures import Future

import pytest

from moe_prefill.core import AtomicResult
from moe_prefill.errors import RowError, WorkerError
from moe_prefill.server.backends import Lists, Routed, backend_of
from moe_prefill.server.fairqueue import Part, make_work
from moe_prefill.server.refusals import Refused
from moe_prefill.server.scheduler import Call, Policy, Scheduler
from moe_prefill.server.settings import Routing
from moe_prefill.workers import RoutedEngine

from .helpers import Clock, FakeEngine, request


class Starting(FakeEngine):
    """May begin a list while it computes another; each call waits until the test lets it go."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.gates = [threading.Event() for _ in range(8)]

    def start(self, requests):
        return lambda: self.score(requests)

    def score(self, requests):
        gate = self.gates[len(self.calls)]
        self.calls.append(list(requests))
        assert gate.wait(30)
        return [self._one(request) for request in requests]


class Routing1by1(FakeEngine):
    """Futures that the test resolves."""

    def __init__(self):
        super().__init__()
        self.given = []

    def submit(self, requests, *, patient):
        assert patient, "the scheduler's queue is the one that refuses"
        replies = [Future() for _ in requests]
        self.given += zip(requests, replies, strict=True)
        return replies


def work_of(*seeds):
    return make_work([request(10, seed) for seed in seeds])[0]


def started(engine, **policy):
    scheduler = Scheduler(engine, Policy(max_queue_tokens=10**6, max_wait_s=0, **policy))
    scheduler.start()
    return scheduler


def wait_until(condition):
    pause = threading.Event()
    for _ in range(4000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it does not happen")


def test_kinds_of_engines():
    assert isinstance(backend_of(Routing1by1()), Routed)
    assert hasattr(RoutedEngine, "submit"), "it is taken for one that routes"
    assert [backend_of(engine).calls_at_once for engine in (FakeEngine(), Starting())] == [1, 2]
    assert isinstance(backend_of(Starting()), Lists)


def test_a_call_of_an_engine_of_lists_is_whole_sweeps_or_less_than_one():
    lists, routed = backend_of(FakeEngine(max_sweep=1000)), backend_of(Routing1by1())
    assert [lists.fitting(tokens) for tokens in (10, 949, 951, 1500, 1899, 1950, 9999)] == [
        10, 949, 950, 950, 950, 1900, 9500,
    ]  # fmt: skip
    assert routed.fitting(1500) == 1500


def test_policies_of_the_settings_are_those_of_the_frontend():
    from typing import get_args

    from moe_prefill.frontend import POLICIES

    assert get_args(Routing) == (*POLICIES, "off")


def test_a_second_call_begins_while_the_first_is_computed():
    engine = Starting()
    scheduler = started(engine)
    first, second = work_of(1), work_of(2)
    scheduler.submit(first)
    wait_until(lambda: len(engine.calls) == 1)
    scheduler.submit(second)
    wait_until(lambda: len(engine.calls) == 2)
    assert scheduler.running_tokens == 20
    scheduler.submit(third := work_of(3))
    engine.gates[1].set()  # the later one is done first
    assert isinstance(second.reply.result(30)[0], AtomicResult)
    assert not first.reply.done()
    for gate in engine.gates:
        gate.set()
    assert isinstance(first.reply.result(30)[0], AtomicResult)
    assert isinstance(third.reply.result(30)[0], AtomicResult)
    scheduler.close()


def test_parts_of_one_work_may_be_done_in_any_order():
    engine = Starting()
    scheduler = Scheduler(engine, Policy(max_queue_tokens=10**6, max_wait_s=0))
    scheduler.state = "ready"
    scheduler.paces["interactive"].add(20, scheduler.paces["interactive"].call_s)  # two requests a call
    requests = [request(10, seed) for seed in range(4)]
    work, places = make_work(requests)
    scheduler.submit(work)
    first, second = scheduler.decide(), scheduler.decide()
    assert [call.num_requests for call in (first, second)] == [2, 2]
    for gate in engine.gates:
        gate.set()
    scheduler.run(second)
    assert not work.reply.done()
    scheduler.run(first)
    answers = work.reply.result(0)
    for place, want in zip(places, requests, strict=True):
        assert answers[place].logits.tolist() == engine._one(want).logits.tolist()


def test_the_pace_of_overlapping_calls_is_the_engines_own():
    """Two calls that begin together and end one after the other have taken half of the time each."""
    clock = Clock()
    scheduler = Scheduler(Starting(), Policy(max_queue_tokens=10**6, max_wait_s=0, max_sweep_s=2.0), clock=clock)
    calls = [Call([Part(work_of(*seeds), 0, 10)], "interactive") for seeds in (range(10), range(10, 20))]
    begin_s = clock()
    for call in calls:
        clock.now_s += 1.0
        scheduler._learn(call.tokens, begin_s)
    assert scheduler.pace.tokens_per_s == pytest.approx(100)


def test_a_routed_request_is_answered_when_it_is_done():
    engine = Routing1by1()
    scheduler = Scheduler(engine, Policy(max_queue_tokens=10**6, max_wait_s=0))
    works = [work_of(1, 2), work_of(3), work_of(4)]
    for work in works:
        scheduler.state = "ready"
        scheduler.submit(work)
    scheduler.state = "starting"
    scheduler.start()
    wait_until(lambda: len(engine.given) == 4)
    given = {int(asked.tokens[0]): reply for asked, reply in engine.given}

    def resolve(work, index, outcome=None):
        reply = given[int(work.requests[index].tokens[0])]
        if outcome is None:
            reply.set_result(engine._one(work.requests[index]))
        else:
            reply.set_exception(outcome)

    resolve(works[1], 0)
    assert isinstance(works[1].reply.result(30)[0], AtomicResult)
    resolve(works[0], 1)
    assert not works[0].reply.done()
    resolve(works[2], 0, RowError("too_long", "too long"))
    assert isinstance(works[2].reply.result(30)[0], RowError), "its own error, and nobody else's"
    resolve(works[0], 0)
    assert len(works[0].reply.result(30)) == 2
    assert scheduler.state == "ready"
    scheduler.close()


def test_who_leaves_is_withdrawn_from_an_engine_that_routes():
    engine = Routing1by1()
    scheduler = started(engine)
    works = [work_of(1, 2, 3), work_of(4)]
    for work in works:
        scheduler.submit(work)
    wait_until(lambda: len(engine.given) == 4)
    replies = {int(asked.tokens[0]): reply for asked, reply in engine.given}
    first, *others = [replies[int(asked.tokens[0])] for asked in works[0].requests]
    assert first.set_running_or_notify_cancel(), "its sweep runs"
    assert works[0].reply.cancel()
    assert not first.cancelled()
    assert all(reply.cancelled() for reply in others)
    first.set_result(engine._one(works[0].requests[0]))  # and is dropped
    replies[int(works[1].requests[0].tokens[0])].set_result(engine._one(works[1].requests[0]))
    assert isinstance(works[1].reply.result(30)[0], AtomicResult)
    scheduler.close()
    assert scheduler.running_tokens == 0


def test_what_was_withdrawn_does_not_count_as_speed():
    clock, engine = Clock(), Routing1by1()
    scheduler = Scheduler(engine, Policy(max_queue_tokens=10**6, max_wait_s=0, max_sweep_s=2.0), clock=clock)
    scheduler.state = "ready"
    kept, gone = work_of(1), work_of(*range(2, 11))
    for work in (kept, gone):
        scheduler.submit(work)
    call = scheduler.decide()
    thread = threading.Thread(target=scheduler.run, args=(call,))
    thread.start()
    wait_until(lambda: len(engine.given) == 10)
    clock.now_s += 1.0
    gone.reply.cancel()
    engine.given[0][1].set_result(engine._one(kept.requests[0]))
    thread.join(30)
    assert call.tokens == 100
    assert scheduler.pace.tokens_per_s == pytest.approx(10)


def test_a_routed_engine_that_is_lost_answers_everyone():
    engine = Routing1by1()
    scheduler = started(engine)
    inside = [work_of(1), work_of(2)]
    for number, work in enumerate(inside):
        scheduler.submit(work)
        wait_until(lambda number=number: len(engine.given) == number + 1)
    scheduler.submit(waits := work_of(3))
    for _, reply in engine.given:
        reply.set_exception(WorkerError("gone"))
    for work in inside:
        assert isinstance(work.reply.result(30)[0], WorkerError)
    with pytest.raises(Refused):
        waits.reply.result(30)
    wait_until(lambda: scheduler.state == "failed")
    scheduler.close()
