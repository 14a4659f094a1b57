"""A baseline behind a balancer: every rank works out what the frontend would give each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from moe_prefill.blocks import BlockHasher
from moe_prefill.core import AtomicRequest, ModelSpec
from moe_prefill.forming import Forming
from moe_prefill.frontend import Frontend, Machine, Ticket, make_policy, make_ticket

from .sides import Side


def tickets_of(requests: Sequence[AtomicRequest], spec: ModelSpec) -> list[Ticket]:
    """All handed in at once."""
    hasher = BlockHasher("benchmark")
    return [make_ticket(each, hasher, id=index, vocab_size=spec.vocab_size) for index, each in enumerate(requests)]


def rounds_of(
    requests: Sequence[AtomicRequest], machine: Machine, policy: str, workers: int
) -> Iterator[list[list[AtomicRequest]]]:
    """What each worker computes in every round, nothing where it has no requests; all of them are in step."""
    costs, rule = machine.costs, make_policy(policy, machine.costs, machine.limits)
    frontend = Frontend(workers, rule, costs, machine.bounds, machine.admission)
    for ticket in tickets_of(requests, machine.spec):
        frontend.submit(ticket)
    while not frontend.idle:
        frontend.route()
        sweeps = [frontend.next_sweep(index, math.inf) for index in range(workers)]
        yield [[ticket.request for ticket in sweep.tickets] if sweep else [] for sweep in sweeps]
        for sweep in filter(None, sweeps):
            frontend.finished(sweep.number)


def sweeps_of(
    requests: Sequence[AtomicRequest], side: Side, machine: Machine, policy: str, forming: Forming
) -> list[list[list[AtomicRequest]]]:
    """Each rank's sweeps. Under pp all ranks have the same: the rounds of one worker, cut into micro-batches as
    ``forming`` says.
    """
    if side.owns_requests:
        return [list(own) for own in zip(*rounds_of(requests, machine, policy, side.gpus), strict=True)]
    micro = [
        [given[index] for index in members]
        for (given,) in rounds_of(requests, machine, policy, 1)
        for members in forming.sweeps(given, range(len(given)))
    ]
    return [micro] * side.gpus
