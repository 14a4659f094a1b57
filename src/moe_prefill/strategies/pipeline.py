"""pp+pp: each rank computes its layers of one micro-batch after the other and sends the residual on.

A sweep's tokens are cut into micro-batches of whole requests, so that each is planned like a sweep of its own. The next
residual is received while this one is computed. Only the last rank reads the head; at the end it gives everybody the
answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from ..config import EngineConfig
from ..core import AtomicRequest, AtomicResult, Float32Array
from ..engine.local import Answer
from ..engine.plan import SweepPlan
from ..engine.sweep import SweepOutput, read_head, rope_rows, run_layer
from ..forming import Forming
from .collectives import Collectives, Traffic
from .engine import RankModel, StrategyEngine


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """A residual on its way; ``arrive`` before reading it, or, for one that was sent, before overwriting it."""

    x_TD: torch.Tensor
    work: dist.Work
    computed: torch.cuda.Event | None = None

    def arrive(self) -> torch.Tensor:
        self.work.wait()  # over NCCL only the stream waits
        return self.x_TD


@dataclass(frozen=True, slots=True)
class Link:
    """Two neighbouring stages, with a process group of their own: what one link carries delays no other."""

    group: dist.ProcessGroup
    peer: int
    traffic: Traffic

    def receive(self, x_TD: torch.Tensor) -> Transfer:
        """Begin to fill ``x_TD`` with what the neighbour sends."""
        return Transfer(x_TD, _started(dist.irecv(x_TD, self.peer, group=self.group)))

    def send(self, x_TD: torch.Tensor) -> Transfer:
        """Begin to send ``x_TD``, which must stay as it is until it has arrived."""
        self.traffic.add("send", x_TD.nbytes)
        computed = torch.cuda.current_stream().record_event() if x_TD.is_cuda else None
        return Transfer(x_TD, _started(dist.isend(x_TD, self.peer, group=self.group)), computed)


def links(collectives: Collectives) -> tuple[Link | None, Link | None]:
    """The links to the stages before and behind this one. Every process of the default group has to call this."""
    rank, size = collectives.ranks.rank, collectives.ranks.size
    made: list[Link | None] = [None]
    for first in range(size - 1):
        group = dist.new_group([first, first + 1])
        peer = first if rank == first + 1 else first + 1
        made.append(Link(group, peer, collectives.traffic) if rank in (first, first + 1) else None)
    made.append(None)
    return made[rank], made[rank + 1]


class PipelineEngine(StrategyEngine):
    """One stage. All ranks are given the same list and return the same answers."""

    def __init__(self, part: RankModel, config: EngineConfig) -> None:
        super().__init__(part, config)
        self._micro_batches = config.micro_batches
        self._before, self._after = links(part.collectives)
        self._ahead: deque[tuple[SweepPlan, Transfer | None]] = deque()
        self._sent: deque[Transfer] = deque()

    @property
    def forming(self) -> Forming:
        """Sweeps are micro-batches here; a request that is longer than one is one of its own."""
        plain = super().forming
        tokens = -(-plain.limits.max_sweep_tokens // self._micro_batches)
        return replace(plain, limits=replace(plain.limits, max_sweep_tokens=tokens))

    def score(self, requests: Sequence[AtomicRequest]) -> list[Answer]:
        return self._from_last_rank(requests, super().score(requests))

    def compute(self, sweeps: Iterable[Sequence[AtomicRequest] | None]) -> Iterator[list[AtomicResult]]:
        return super().compute(self._announced(sweeps))

    def plan(self, requests: Sequence[AtomicRequest]) -> SweepPlan:
        return self._ahead[0][0]

    def close(self) -> None:
        super().close()
        for link in (self._before, self._after):
            if link is not None:
                dist.destroy_process_group(link.group)

    def _announced(self, sweeps: Iterable[Sequence[AtomicRequest] | None]) -> Iterator[Sequence[AtomicRequest] | None]:
        """Each micro-batch, once the one behind it is planned and its residual is being received, or none is there."""
        waiting: Sequence[AtomicRequest] | None = None
        for requests in sweeps:
            if requests is None:
                if waiting is not None:
                    yield waiting
                waiting = None
                yield None
                continue
            assert requests, "a pipeline has no sweeps without requests"
            plan = super().plan(requests)
            self._ahead.append((plan, self._receive(plan)))
            if waiting is not None:
                yield waiting
            waiting = requests
        if waiting is not None:
            yield waiting

    def _receive(self, plan: SweepPlan) -> Transfer | None:
        embed = self._weights.embed
        shape = (plan.forest.num_tokens, self.spec.hidden_size)
        return self._before.receive(embed.new_empty(shape)) if self._before else None

    def _run(self, plan: SweepPlan) -> SweepOutput:
        _, incoming = self._ahead.popleft()
        x = incoming.arrive() if incoming else self._weights.embed.index_select(0, plan.tokens)
        rope = rope_rows(plan, x.dtype)
        hidden = self._decoder.hidden(self._weights.layers[0].attention, x)
        for index, (layer, ahead) in zip(self.share.layers, self._weights.with_next, strict=True):
            self.traffic.layer = index
            bank = self._banks.acquire(index)
            hidden = run_layer(plan, self._decoder, layer, ahead, bank, index, hidden, rope)
            self.layer_done()
        if self._after is None:
            return read_head(plan, self._decoder, self._weights, hidden.residual)
        self._sent.append(self._after.send(hidden.residual))
        return SweepOutput(None, None)

    def _results(self, requests: Sequence[AtomicRequest], plan: SweepPlan, output: SweepOutput) -> list[AtomicResult]:
        if self._after is None:
            return super()._results(requests, plan, output)
        sent = self._sent.popleft()
        if sent.computed is not None:
            sent.computed.synchronize()  # so the host is never more than two micro-batches ahead
        sent.arrive()
        return [_unanswered(request) for request in requests]

    def _from_last_rank(self, requests: Sequence[AtomicRequest], answers: list[Answer]) -> list[Answer]:
        """The last rank's results everywhere; what was refused was refused everywhere alike."""
        places = [place for place, answer in enumerate(answers) if isinstance(answer, AtomicResult)]
        results = [cast(AtomicResult, answers[place]) for place in places]
        flat = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *map(_flat, results)]))
        last = self._collectives.ranks.size - 1
        dist.broadcast(flat, last, group=self._collectives.ranks.control)
        values, done = flat.numpy(), 0
        for place, blank in zip(places, results, strict=True):
            size = len(_flat(blank))
            answers[place] = _unflat(blank, values[done : done + size])
            done += size
        return answers


def _unanswered(request: AtomicRequest) -> AtomicResult:
    """A result of the right shapes, to be filled by the last rank's."""
    asked, top = len(request.positions), (len(request.positions), request.top_k)
    return AtomicResult(
        np.empty(len(request.ids), np.float32),
        np.empty(asked, np.float32) if request.vocabulary else None,
        np.empty(top, np.int32) if request.top_k else None,
        np.empty(top, np.float32) if request.top_k else None,
    )


def _arrays(result: AtomicResult) -> list[np.ndarray]:
    found = (result.logits, result.log_z, result.top_ids, result.top_logprobs)
    return [array for array in found if array is not None]


def _flat(result: AtomicResult) -> Float32Array:
    """All arrays of a result, one after the other; the ids by their bits."""
    return np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.float32) for array in _arrays(result)])


def _unflat(like: AtomicResult, values: Float32Array) -> AtomicResult:
    done = 0

    def take(array: Any) -> Any:
        nonlocal done
        if array is None:
            return None
        done += array.size
        return values[done - array.size : done].view(array.dtype).reshape(array.shape).copy()

    return AtomicResult(take(like.logits), take(like.log_z), take(like.top_ids), take(like.top_logprobs))


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not in the link's group"
    return work
