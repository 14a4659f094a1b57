"""Functions of many small operations that run on a CPU without Python's lock.

Threads that share a CPU's cores take the lock anew behind every operation and wait for each other there, which counts
where operations take some ten microseconds (docs/log.md). A function in TorchScript holds no lock from its
beginning to its end. TorchScript is a part of Python, so where it is not to be had (it ends with Python 3.13) the
function runs as it stands.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

Args = ParamSpec("Args")
Result = TypeVar("Result")
_lock = threading.Lock()


def scripted(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """The function, compiled at its first call, for tensors of a CPU. What it calls must be TorchScript too, but
    undecorated.
    """

    compiled: list[Callable[Args, Result]] = []

    @functools.wraps(function)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        if not compiled:
            with _lock:
                compiled[:] = compiled or [_compiled(function)]
        return compiled[0](*args, **kwargs)

    return call


def _compiled(function: Callable[Args, Result]) -> Callable[Args, Result]:
    if sys.version_info >= (3, 14):
        return function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # in favour of compilers that need one of C++ as well
        return cast(Callable[Args, Result], torch.jit.script(function))
