"""One item ahead: the next window is read and tokenised while the engine works on this one."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
_JOIN_S = 5.0  # an interrupted job does not wait longer for the thread, which dies with the process


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class _End:
    pass


@contextmanager
def one_ahead(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Iterate over ``items`` with the next one made in another thread. Its errors are raised here, in order.

    Capacity 1: a permit is taken before an item is made and given back when it is fetched, so beside the one in use
    at most one more exists in memory.
    """
    channel: SimpleQueue[T | _Failed | _End] = SimpleQueue()
    permit = threading.Semaphore(1)
    stopped = threading.Event()

    def produce() -> None:
        try:
            source = iter(items)
            while permit.acquire() and not stopped.is_set():
                channel.put(next(source))
        except StopIteration:
            channel.put(_End())
        except BaseException as error:  # handed over, not swallowed
            channel.put(_Failed(error))

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield _fetched(channel, permit)
    finally:
        stopped.set()
        permit.release()
        thread.join(_JOIN_S)


def _fetched(channel: SimpleQueue[T | _Failed | _End], permit: threading.Semaphore) -> Iterator[T]:
    while not isinstance(item := channel.get(), _End):
        if isinstance(item, _Failed):
            raise item.error
        permit.release()
        yield item
