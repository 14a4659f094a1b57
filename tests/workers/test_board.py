"""Who computes which sweep, and when a worker has waited too long: decisions without processes."""

from __future__ import annotations

import random
from queue import SimpleQueue

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.messages import PackedRequests
from moe_prefill.workers.board import DEPTH, Board, Sweep
from moe_prefill.workers.page import ProgressPage
from moe_prefill.workers.watch import Patience, Watch


def sweep(number: int) -> Sweep:
    return Sweep([number], PackedRequests.pack([]), SimpleQueue())


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 20), st.sampled_from(["free", "rounds", "together"]), st.integers())
def test_every_sweep_is_done_once_whatever_is_lost(ranks, count, schedule, seed):
    chance = random.Random(seed)
    board, done = Board(ranks, schedule), []
    seen: list[list[int]] = [[] for _ in range(ranks)]
    for number in range(count):
        board.add(sweep(number))
    running: list[list[int]] = [[] for _ in range(ranks)]
    for step in range(1000):
        for item in board.give():
            running[item.rank].append(item.number)
            seen[item.rank].append(item.number)
            assert len(running[item.rank]) <= DEPTH
        assert board.busy() == [bool(numbers) for numbers in running]
        if board.idle:
            break
        if step < 30 and chance.random() < 0.1:
            board.take_back()
            running, seen = [[] for _ in range(ranks)], [[] for _ in range(ranks)]
            continue
        rank = chance.choice([rank for rank in range(ranks) if running[rank]])
        finished = board.done(rank, running[rank].pop(0))
        done += [] if finished is None else finished.members
    assert board.idle
    if schedule != "free":  # every rank has been given the same numbers since the last loss
        assert all(numbers == seen[0] for numbers in seen)
    assert sorted(done) == list(range(count))


def test_what_comes_back_keeps_its_order():
    board = Board(2, "free")
    for number in range(6):
        board.add(sweep(number))
    assert [(item.rank, item.sweep.members) for item in board.give()] == [(0, [0]), (1, [1]), (0, [2]), (1, [3])]
    board.done(1, 1)
    assert board.take_back() == 3
    assert [item.sweep.members for item in board.give()] == [[0], [2], [3], [4]]


def test_a_round_has_an_entry_for_every_rank():
    board = Board(3, "rounds")
    for number in range(4):
        board.add(sweep(number))
    given_out = [(item.rank, item.number, item.sweep and item.sweep.members) for item in board.give()]
    assert given_out == [(0, 0, [0]), (1, 0, [1]), (2, 0, [2]), (0, 1, [3]), (1, 1, None), (2, 1, None)]


def test_together_a_rank_may_be_ahead_of_the_others():
    board = Board(2, "together")
    for number in range(4):
        board.add(sweep(number))
    assert [(item.rank, item.number) for item in board.give()] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert board.done(0, 0) is None
    assert board.done(0, 1) is None
    assert [(item.rank, item.number) for item in board.give()] == [(0, 2), (0, 3)]
    answered = board.done(1, 0)
    assert answered is not None
    assert answered.members == [0]
    assert board.take_back() == 3
    assert [item.sweep.members for item in board.give()] == [[1], [1], [2], [2]]


def test_patience_grows_with_the_longest_layer():
    now = [0.0]
    counts = np.zeros(2, np.int64)
    watch = Watch(counts.tolist, Patience(layer_s=30, layer_factor=10), clock=lambda: now[0])
    now[0] = 29
    assert watch.hanging([True, True]) == []
    counts[0] = 2  # 14.5 s a layer
    assert watch.hanging([True, True]) == []
    assert watch.limit_s == 145
    now[0] = 146
    assert watch.hanging([True, True]) == [1]
    now[0] = 175
    assert watch.hanging([True, False]) == [0]


def test_patience_starts_from_what_is_predicted():
    assert Watch(lambda: [0], Patience(layer_s=30), 5.0).limit_s == 50
    assert Watch(lambda: [0], Patience(layer_s=30), 0.1).limit_s == 30


def test_waiting_for_work_is_not_hanging():
    now = [0.0]
    counts = np.zeros(1, np.int64)
    watch = Watch(counts.tolist, Patience(layer_s=1), clock=lambda: now[0])
    for now[0] in (10.0, 20.0):
        assert watch.hanging([False]) == []
    now[0] = 20.9
    assert watch.hanging([True]) == []
    counts[0] = 1
    assert watch.hanging([True]) == []
    assert watch.longest_s < 1  # the wait before is no part of the layer


def test_the_page_is_one_memory():
    page = ProgressPage.create(3)
    other = ProgressPage(page.fd, 3)
    other.counts[2:3] += 5
    assert page.read() == [0, 0, 5]
    page.close()
