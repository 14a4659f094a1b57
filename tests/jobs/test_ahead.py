"""One item ahead, on a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from moe_prefill.errors import RowError
from moe_prefill.jobs.ahead import one_ahead


def test_one_ahead_is_one_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    with one_ahead(items()) as ahead:
        for i, item in enumerate(ahead):
            assert item == i
            assert len(made) <= i + 3  # the one in use, the one that waits, and no other finished
    assert made == list(range(20))


def test_errors_of_the_thread_are_raised_after_the_items_before_them() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RowError("odd", "in the thread")

    seen: list[int] = []
    with one_ahead(items()) as ahead, pytest.raises(RowError, match="in the thread"):
        seen.extend(ahead)
    assert seen == [1]


def test_leaving_early_ends_the_thread() -> None:
    def items() -> Iterator[int]:
        yield from range(10**9)

    before = set(threading.enumerate())
    with one_ahead(items()) as ahead:
        assert next(ahead) == 0
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
