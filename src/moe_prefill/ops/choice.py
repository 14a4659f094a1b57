"""Which of several kernels for the same thing runs: the fastest that can, or the one that the environment names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ..errors import UsageError


class Named(Protocol):
    @property
    def name(self) -> str: ...


K = TypeVar("K", bound=Named)


def choose(kernels: Sequence[K], refusal: Callable[[K], str | None], variable: str) -> K:
    """The first of ``kernels``, fastest first, that ``refusal`` has nothing against, or the one that the environment's
    ``variable`` names, where that runs. The last one always runs. UsageError: there is no kernel of that name.
    """
    wanted, names = os.environ.get(variable), [kernel.name for kernel in kernels]
    if wanted and wanted not in names:
        raise UsageError(f"{variable} is {wanted!r}; it must be one of {', '.join(names)}, or unset")
    legal = [kernel for kernel in kernels if refusal(kernel) is None]
    named = [kernel for kernel in legal if kernel.name == wanted]
    return (named or legal)[0]


def explain(kernels: Sequence[K], refusal: Callable[[K], str | None], variable: str) -> list[str]:
    """A line for each kernel: chosen, possible, or why not."""
    chosen = choose(kernels, refusal, variable)
    states = ((kernel, refusal(kernel) or ("chosen" if kernel is chosen else "possible")) for kernel in kernels)
    return [f"{kernel.name}: {state}" for kernel, state in states]
