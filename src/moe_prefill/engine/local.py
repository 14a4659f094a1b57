"""The engine of one device: requests to sweeps, sweeps to answers, with the next sweep planned while this one is
computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .. import ops
from ..blocks import BlockEvents
from ..config import Sharing
from ..core import AtomicRequest, AtomicResult, EngineLimits, ModelSpec, RunStats, Schedule
from ..experts import BankSource, TransferStats
from ..forming import Forming, sharing_rule
from ..machine import datasheet_peak
from ..memory import GIB, MemoryPlan, kv_block_bytes
from ..models.decoder import Decoder
from ..models.weights import ExpertBank, ModelWeights
from ..residency import ResidencyPlan
from .cores import cores_of
from .finite import Note, WatchedDecoder, first_fault
from .head import ReadPlan
from .kv import PrefixPool, SweepBlocks
from .plan import SweepPlan, build_sweep_plan
from .quantized import blocks_of
from .sweep import GroupOutput, SweepOutput, run_sweep, run_without_tokens
from .trace import TraceWriter

_log = logging.getLogger(__name__)
Answer = AtomicResult | Exception
_SWEEPS_KEPT = 256  # of what transfers cost, for whoever asks


@dataclass(frozen=True, slots=True)
class _Launched:
    requests: Sequence[AtomicRequest]
    plan: SweepPlan
    output: SweepOutput
    started: float
    notes: Sequence[Note] = ()  # of parts that gave NaN or infinity, if anybody looks


class _Empty:
    """A sweep of no requests."""


class LocalEngine:
    """Implements ``core.ScoringEngine`` on one device. Not thread-safe: one caller at a time.

    ``rounds``: the banks come in rounds with those of other ranks, so every rank must be given the same number of
    sweeps, empty ones among them. ``on_layer`` is called after a layer's work is enqueued; it must not wait for it.
    ``threads``: cores of a CPU to use. ``residency``: where the banks live, for reports. ``transfers``: what streaming
    cost each of the last sweeps; ``trace`` is told of every one. ``check_finite``: what first gives NaN or infinity in
    a sweep is logged.
    ``kv_blocks``: size of the pool in which prefixes outlive their sweep; 0: there is none. ``worker`` names it in its
    events.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        banks: BankSource[ExpertBank],
        memory: MemoryPlan,
        *,
        device: torch.device,
        sharing: Sharing = "auto",
        prune_last: bool = True,
        quantization: str | None = None,
        rounds: bool = False,
        on_layer: Callable[[], None] | None = None,
        trace: TraceWriter | None = None,
        residency: ResidencyPlan | None = None,
        threads: int = 1,
        kv_blocks: int = 0,
        worker: int = 0,
        check_finite: bool = False,
    ) -> None:
        self.spec = spec
        self.memory = memory
        self._weights = weights
        self._banks = banks
        self._device = device
        self._decoder = WatchedDecoder(spec, weights) if check_finite else Decoder(spec)
        self._rule = sharing_rule(spec, sharing)
        self._sharing = sharing
        self._prune_last = prune_last
        self._quantization = quantization
        self.schedule: Schedule = "rounds" if rounds else "free"
        self.on_layer = on_layer
        self._trace = trace
        self.residency = residency
        self._threads = threads
        self._cores = cores_of(device, threads)
        self.transfers: deque[TransferStats] = deque(maxlen=_SWEEPS_KEPT)
        self._stats = RunStats()
        self._pool = None
        if kv_blocks:
            self._pool = PrefixPool(
                spec,
                kv_blocks,
                dtype=weights.embed.dtype,
                device=device,
                worker=worker,
                private_beyond=self.forming.private_beyond,
            )

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def kv_blocks(self) -> int:
        """Blocks of 16 tokens that the pool of prefixes holds; 0: there is none."""
        return 0 if self._pool is None else self._pool.blocks.capacity

    @property
    def device_kind(self) -> str:
        return self._device.type

    @property
    def limits(self) -> EngineLimits:
        size = kv_block_bytes(self.spec, self._weights.embed.element_size())
        return replace(self.memory.limits(self.spec), kv_gib=self.kv_blocks * size / GIB)

    @property
    def forming(self) -> Forming:
        """How lists of requests become this engine's sweeps."""
        rope = self.spec.rope
        return Forming(
            limits=self.limits,
            rule=self._rule,
            private_beyond=rope.original_max_positions if rope.kind == "dynamic" else None,
        )

    @property
    def stats(self) -> RunStats:
        return self._stats

    @property
    def peak_flops(self) -> float | None:
        if self._device.type != "cuda":
            return None
        precision = "float8" if self._quantization not in (None, "fp8-weights") else self._dtype_name()
        return datasheet_peak(torch.cuda.get_device_name(self._device), precision)

    @property
    def experts_kernel(self) -> str:
        """What multiplies the experts: a kernel's name, or how their float8 is computed."""
        if self._quantization is not None:
            return self._quantization
        wide = self._device.type == "cpu" or self._weights.embed.dtype != torch.bfloat16
        return "plain" if wide else ops.experts_kernel(self._device).name

    @property
    def plan_digest(self) -> str:
        """What may change a result's last bits, as one short string."""
        facts = {
            "device": "cpu" if self._device.type == "cpu" else torch.cuda.get_device_name(self._device),
            "dtype": self._dtype_name(),
            "quantization": self._quantization,
            "attention": self._attention_kernel(),
            "experts": self.experts_kernel,
            "torch": torch.__version__,
            "threads": self._threads if self._device.type == "cpu" else 0,
            "sharing": self._sharing,
            "prune_last": self._prune_last,
            "sweep": [self.memory.max_sweep_tokens, self.memory.chunk_rows, self.memory.max_gathered_keys],
            "logits": self.memory.logits_block_bytes,
            **({"kv_blocks": self.kv_blocks} if self.kv_blocks else {}),
            **({"linear": ops.block_linear_kernel(self._device)} if blocks_of(self._quantization)[1] else {}),
        }
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def score(self, requests: Sequence[AtomicRequest]) -> list[Answer]:
        """Answers in the order of the requests; a request that cannot be computed gets its RowError."""
        forming = self.forming
        answers: list[Answer | None] = [forming.refusal(request) for request in requests]
        valid = [index for index, answer in enumerate(answers) if answer is None]
        given: deque[list[int]] = deque()

        def sweeps() -> Iterator[list[AtomicRequest]]:
            for members in forming.sweeps(requests, valid):
                given.append(members)
                yield [requests[index] for index in members]

        for results in self.compute(sweeps()):
            for index, result in zip(given.popleft(), results, strict=True):
                answers[index] = result
        done = [answer for answer in answers if answer is not None]
        assert len(done) == len(requests), "every request gets exactly one answer"
        return done

    @torch.inference_mode()
    def compute(self, sweeps: Iterable[Sequence[AtomicRequest] | None]) -> Iterator[list[AtomicResult]]:
        """The results of each sweep, in order. A sweep is planned and enqueued while the one before it runs; None
        says that no other is there yet, so the running one is waited for. A sweep of no requests only moves banks.
        With a pool, a ``HashedSweep`` says what will be asked for again; other lists say it by what they share.
        """
        waiting: _Launched | _Empty | None = None
        for requests in sweeps:
            launched = None if requests is None else self._launch(requests)
            if waiting is not None:
                yield self._collect(waiting)
            waiting = launched
        if waiting is not None:
            yield self._collect(waiting)

    def close(self) -> None:
        """Free the device's memory; the engine is not to be used afterwards."""
        self._cores.close()
        self._banks.close()
        if self._trace is not None:
            self._trace.close()
        self._pool = None
        del self._weights, self._banks
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def take_events(self) -> BlockEvents | None:
        """What the sweeps enqueued since the last call changed in the pool; None: there is no pool."""
        return None if self._pool is None else self._pool.blocks.take_events()

    def snapshot(self) -> BlockEvents | None:
        """The whole pool; None: there is none."""
        return None if self._pool is None else self._pool.blocks.snapshot()

    def plan(self, requests: Sequence[AtomicRequest]) -> SweepPlan:
        """The plan of one sweep, uploaded. The requests are those of one entry of ``forming.sweeps``."""
        return self._plan(requests, None)

    def _plan(self, requests: Sequence[AtomicRequest], blocks: SweepBlocks | None) -> SweepPlan:
        salts = self.forming.salts(requests)
        return build_sweep_plan(
            requests,
            salts,
            self.spec,
            self._rule,
            self.memory,
            self._device,
            prune_last=self._prune_last,
            cores=self._threads,
            blocks=blocks,
        )

    def _launch(self, requests: Sequence[AtomicRequest]) -> _Launched | _Empty:
        if not requests:
            self._run_empty()
            return _Empty()
        if self._pool is None:
            return self._enqueue(requests, self.plan(requests))
        blocks = self._pool.take(requests)
        try:
            return self._enqueue(requests, self._plan(requests, blocks))
        except BaseException:
            self._pool.give_up(blocks)
            raise

    def _enqueue(self, requests: Sequence[AtomicRequest], plan: SweepPlan) -> _Launched:
        started = time.perf_counter()
        output = self._run(plan)
        notes = self._decoder.take_notes() if isinstance(self._decoder, WatchedDecoder) else ()
        return _Launched(requests, plan, output, started, notes)

    def _run(self, plan: SweepPlan) -> SweepOutput:
        tensors = None if self._pool is None else self._pool.tensors
        return run_sweep(plan, self._decoder, self._weights, self._banks, self.on_layer, self._cores, tensors)

    def _run_empty(self) -> None:
        """A rank's part of a round in which it has no requests."""
        run_without_tokens(self.spec.num_layers, self._banks, self.on_layer)

    def _collect(self, sweep: _Launched | _Empty) -> list[AtomicResult]:
        if isinstance(sweep, _Empty):
            return []
        results = self._results(sweep.requests, sweep.plan, sweep.output)
        self._count(sweep, time.perf_counter())
        fault = first_fault(sweep.notes)
        if fault is not None:
            _log.error("NaN or infinity in a sweep of %d requests, first in %s", len(sweep.requests), fault)
        return results

    def _results(self, requests: Sequence[AtomicRequest], plan: SweepPlan, output: SweepOutput) -> list[AtomicResult]:
        """Bring a sweep's outputs to the host (this waits for it) and hand them out."""
        groups = {True: _host(output.vocabulary), False: _host(output.candidates)}
        return [
            _answer(request, read, groups[read.vocabulary]) for request, read in zip(requests, plan.reads, strict=True)
        ]

    def _count(self, sweep: _Launched, now: float) -> None:
        stats, forest = self._stats, sweep.plan.forest
        stats.sweeps += 1
        stats.requests += len(sweep.requests)
        stats.prompt_tokens += forest.prompt_tokens
        stats.computed_tokens += sweep.plan.num_rows
        stats.pooled_tokens += forest.num_tokens - sweep.plan.num_rows
        stats.flops += sweep.plan.flops
        stats.busy_s += now - max(sweep.started, self._last_end)
        self._last_end = now
        for sweep_stats in self._banks.take_stats():
            stats.exposed_s += 1e-3 * sweep_stats.exposed_ms
            stats.moved_bytes += sum(sweep_stats.bytes_by_link.values())
            self.transfers.append(sweep_stats)
            if self._trace is not None:
                self._trace.add(sweep_stats)

    _last_end = 0.0

    def _attention_kernel(self) -> str:
        dtype = self._weights.embed.dtype
        if self._device.type == "cpu" or dtype == torch.float32:
            return "plain"
        return ops.flash_kernel(self._device).name

    def _dtype_name(self) -> str:
        return str(self._weights.embed.dtype).removeprefix("torch.")


def _host(group: GroupOutput | None) -> dict[str, np.ndarray]:
    if group is None:
        return {}
    found = {"logits": group.logits, "log_z": group.log_z, "top_ids": group.top_ids, "top_logits": group.top_logits}
    return {name: tensor.cpu().numpy() for name, tensor in found.items() if tensor is not None}


def _answer(request: AtomicRequest, read: ReadPlan, group: dict[str, np.ndarray]) -> AtomicResult:
    logits = group["logits"][read.pairs]
    if not read.vocabulary:
        return AtomicResult(logits)
    log_z = group["log_z"][read.rows]
    if not request.top_k:
        return AtomicResult(logits, log_z)
    ids = group["top_ids"][read.rows, : request.top_k].astype(np.int32)
    top = group["top_logits"][read.rows, : request.top_k] - log_z[:, None]
    return AtomicResult(logits, log_z, ids, top)
