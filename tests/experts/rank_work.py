"""What the ranks of the group tests do; imported by each of their processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch._C._distributed_c10d import PrefixStore

from moe_prefill import ops
from moe_prefill.config import EngineConfig
from moe_prefill.engine import build_engine
from moe_prefill.engine.sweep import run_without_tokens
from moe_prefill.errors import WorkerError
from moe_prefill.experts import HybridTransport, Ranks
from moe_prefill.residency import expert_record, shard_of
from tests.experts.faults import ChaosLane, ChaosTransport
from tests.experts.groups import die
from tests.experts.helpers import (
    FOUR_LAYERS,
    cycled_levels,
    engine_on,
    filled_memory,
    model_of,
    requests_of,
    resident_on,
    scores,
    wrapped,
)
from tests.reference import FAMILIES, Converted, engine_of

# The process that forks the ranks makes the models once, on one thread: a pool of threads would not survive the fork.
torch.set_num_threads(1)
for family, seed in [(name, 0) for name in FAMILIES] + [("olmoe", FOUR_LAYERS)]:
    model_of(family, seed)

CPU = torch.device("cpu")
MIXES = (
    (("sharded",), "copy-engine"),
    (("sharded",), "nccl"),
    (("hybrid",), "copy-engine"),
    (("resident", "hybrid", "sharded"), "copy-engine"),
)


@dataclass(frozen=True)
class Case:
    """A model, where its banks live, and how deep the rings are."""

    family: str
    seed: int
    levels: tuple[str, ...]
    transport: str
    buffers: int
    staged_shards: int
    chaos: int | None = None  # a seed


def cases(seeds: int) -> Iterator[Case]:
    """Every family with every mix, rings of 1 to 3; each mix once more under chaos."""
    for seed in range(seeds):
        for place, family in enumerate(FAMILIES):
            for mix, (levels, transport) in enumerate(MIXES):
                depth = 1 + (seed + place + mix) % 3
                case = Case(family, seed, levels, transport, depth, 1 + (seed + mix) % 3)
                yield case
                if place == seed % len(FAMILIES):
                    yield replace(case, chaos=seed)


def below(ranks: Ranks, name: str) -> Ranks:
    """The same ranks, meeting under names of their own."""
    return replace(ranks, store=PrefixStore(name, ranks.store))


def source_of(converted: Converted, case: Case, ranks: Ranks, device: torch.device = CPU):
    memory = filled_memory(
        converted,
        cycled_levels(converted.spec, case.levels),
        device=device,
        buffers=case.buffers,
        staged_shards=case.staged_shards,
        transport=case.transport,
        ranks=ranks,
        slice_bytes=3000,
    )
    if case.chaos is not None:
        if device == CPU:
            make_hostile(memory._transports.values(), case.chaos + ranks.rank)
        wrapped(memory, lambda inner: ChaosTransport(inner, case.chaos + ranks.rank, longest_s=0.002))
    return memory.source()


def make_hostile(transports, seed: int) -> None:
    """Every copy into a staged shard, and of the own one out of it, comes late and after poison."""
    for transport in transports:
        if isinstance(transport, HybridTransport):
            ChaosLane.take_over(transport._staging, seed)
        if hasattr(transport, "_gather") and hasattr(transport._gather, "_beside"):
            ChaosLane.take_over(transport._gather._beside, seed + 1)


def all_cases(ranks: Ranks, seeds: int) -> list[str]:
    """The cases in which this rank's answers are not those of resident banks, or its byte counters are wrong."""
    wrong = []
    for number, case in enumerate(cases(seeds)):
        converted = model_of(case.family, case.seed)
        requests = requests_of(10 * case.seed + ranks.rank)
        expected = scores(engine_of(converted), requests)
        source = source_of(converted, case, below(ranks, str(number)))
        engine = engine_of(converted, banks=source)
        for _ in range(2):
            if not torch.equal(scores(engine, requests), expected):
                wrong.append(f"rank {ranks.rank}: {case}")
        wrong += wrong_bytes(engine.transfers, converted, case, ranks)
        engine.close()
    return wrong


def wrong_bytes(sweeps, converted: Converted, case: Case, ranks: Ranks, sweeps_made: int = 2) -> Iterator[str]:
    """Layers whose counters are not what their level says."""
    count = converted.spec.num_experts
    record = expert_record(converted.spec, str(converted.slots["embed"].dtype).removeprefix("torch."))
    sizes = [len(shard_of(count, r, ranks.size)) * record.num_bytes for r in range(ranks.size)]
    mine, others = sizes[ranks.rank], {f"peer.{r}": n for r, n in enumerate(sizes) if r != ranks.rank}
    copied = {"local": mine, **others}
    wanted = {
        None: {},
        "resident": {},
        "sharded": copied if case.transport == "copy-engine" else {"local": mine, "nccl": sum(sizes) - mine},
        "hybrid": {"host": mine, **copied},
    }
    levels = cycled_levels(converted.spec, case.levels)
    if len(sweeps) != sweeps_made:
        yield f"{len(sweeps)} sweeps have counters"
    for stats in sweeps:
        for layer in stats.layers:
            if dict(layer.bytes_by_link) != wanted[levels[layer.layer]]:
                yield f"rank {ranks.rank}: {case} layer {layer.layer}: {dict(layer.bytes_by_link)}"


def rounds(ranks: Ranks) -> list[str]:
    """Three rounds in which rank r computes 0, 1 or 3 sweeps; the last rank joins late."""
    converted, wrong = model_of("olmoe", FOUR_LAYERS), []
    for number, (levels, transport) in enumerate(
        (("hybrid",), "copy-engine") if n == 0 else (("sharded",), "nccl") for n in range(2)
    ):
        case = Case("olmoe", 0, levels, transport, buffers=2, staged_shards=2)
        requests = requests_of(ranks.rank, count=4)
        expected = scores(engine_of(converted), requests)
        source = source_of(converted, case, below(ranks, str(number)))
        engine = engine_of(converted, banks=source)
        if ranks.rank == ranks.size - 1:
            time.sleep(0.3)
        for turn in range(3):
            has_work = turn < (0, 1, 3)[ranks.rank % 3]
            if not has_work:
                run_without_tokens(converted.spec.num_layers, source)
            elif not torch.equal(scores(engine, requests), expected):
                wrong.append(f"rank {ranks.rank} {transport} turn {turn}")
        engine.close()
    return wrong


def one_rank_dies(ranks: Ranks, levels: tuple[str, ...], transport: str, after: int, abort: bool) -> str:
    """The last rank dies when it has been through ``after`` layers; the others say how that ended for them."""
    converted = model_of("olmoe", FOUR_LAYERS)
    source = source_of(converted, Case("olmoe", 0, levels, transport, buffers=1, staged_shards=1), ranks)
    if abort:
        threading.Timer(1.0, source.abort, ["the controller lost a rank"]).start()
    passed = 0
    try:
        for _ in range(2):
            source.begin_sweep()
            for layer in range(converted.spec.num_layers):
                if ranks.rank == ranks.size - 1 and passed == after:
                    die()
                source.acquire(layer)
                source.release(layer)
                passed += 1
            source.end_sweep()
    except WorkerError as error:
        return str(error)
    return "no error"


def nobody_comes(ranks: Ranks) -> str:
    """Only rank 0 wants to meet."""
    if ranks.rank:
        return ""
    try:
        ranks.meet("alone")
    except WorkerError as error:
        return str(error)
    return "no error"


class _NeverWaitsForStaged(HybridTransport):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        wait = self._signals.wait
        self._signals.wait = lambda kind, value, lane: wait(kind, value, lane) if kind == 1 else None


class _NeverWaitsForGathered(HybridTransport):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        wait = self._signals.wait
        self._signals.wait = lambda kind, value, lane: wait(kind, value, lane) if kind == 0 else None


def broken_hybrid(ranks: Ranks, which: str, seeds: int) -> bool:
    """Whether chaos shows, in this rank, that a wait for the peers is missing."""
    from moe_prefill.engine import banks

    banks.HybridTransport = {"staged": _NeverWaitsForStaged, "gathered": _NeverWaitsForGathered}[which]
    converted = model_of("olmoe", FOUR_LAYERS)
    requests = requests_of(ranks.rank)
    expected = scores(engine_of(converted), requests)
    shown = False
    for seed in range(seeds):
        case = Case("olmoe", 0, ("hybrid",), "copy-engine", buffers=2, staged_shards=1, chaos=seed)
        source = source_of(converted, case, below(ranks, str(seed)))
        engine = engine_of(converted, banks=source)
        for _ in range(3):
            shown |= not torch.equal(scores(engine, requests), expected)
        engine.close()
    return shown


def device_of(ranks: Ranks, on_one_gpu: bool) -> torch.device:
    device = torch.device("cuda", 0 if on_one_gpu else ranks.rank)
    torch.cuda.set_device(device)
    return device


def gpu_cases(ranks: Ranks, mix: int, on_one_gpu: bool) -> list[str]:
    """The cases of one mix in which this rank's answers on its GPU are not those of resident banks there."""
    device, wrong = device_of(ranks, on_one_gpu), []
    levels, transport = MIXES[mix]
    for number, family in enumerate(FAMILIES):
        converted = model_of(family, number, torch.bfloat16)
        requests = requests_of(10 * number + ranks.rank)
        expected = scores(engine_on(device, converted, resident_on(device, converted)), requests)
        for chaos in (None, number):
            case = Case(family, number, levels, transport, 1 + number % 3, 1 + number % 2, chaos)
            source = source_of(converted, case, below(ranks, f"{number}-{chaos}"), device)
            engine = engine_on(device, converted, source)
            for _ in range(3):
                torch.cuda._sleep(20_000_000)  # the copies run ahead of what reads them
                if not torch.equal(scores(engine, requests), expected):
                    wrong.append(f"rank {ranks.rank}: {case}")
            if chaos is None:
                wrong += wrong_bytes(engine.transfers, converted, case, ranks, sweeps_made=3)
            engine.close()
    return wrong


def a_gpu_hangs(ranks: Ranks) -> str:
    """The last rank never starts its round; the others' streams wait for it until they are told not to."""
    device = device_of(ranks, on_one_gpu=True)
    converted = model_of("olmoe", FOUR_LAYERS)
    source = source_of(converted, Case("olmoe", 0, ("hybrid",), "copy-engine", 2, 2), ranks, device)
    if ranks.rank == ranks.size - 1:
        return "hung"
    run_without_tokens(converted.spec.num_layers, source)
    stream = torch.cuda.current_stream(device)
    time.sleep(0.5)
    assert not stream.query(), "a bank came without its last part"
    threading.Timer(0.5, source.abort, ["the controller found a rank that hangs"]).start()
    stream.synchronize()
    try:
        run_without_tokens(converted.spec.num_layers, source)
    except WorkerError as error:
        source.close()
        return str(error)
    return "no error"


def float8_engines(ranks: Ranks, directory: str) -> list[str]:
    """``built_engines`` of a float8 checkpoint with block scales, which experts keep, or not."""
    wrong = built_engines(below(ranks, "rows") if ranks.store else ranks, directory, (("safetensors", None),))
    with mock.patch.object(ops, "blocks_refused", return_value=None):
        kinds = (("safetensors", None), ("dummy", None))
        wrong += built_engines(below(ranks, "blocks") if ranks.store else ranks, directory, kinds)
    return wrong


def built_engines(
    ranks: Ranks,
    directory: str,
    kinds: tuple[tuple[str, str | None], ...] = (("safetensors", None), ("safetensors", "fp8"), ("dummy", None)),
) -> list[str]:
    """The settings by which an engine, built from files in its parts, answers differently from a resident one.
    ``kinds``: load formats and quantisations.
    """
    wrong = []
    for number, (load_format, quantization) in enumerate(kinds):
        settings = {
            "model": directory,
            "device": "cpu",
            "threads": 1,
            "load_format": load_format,
            "quantization": quantization,
            "max_sweep_tokens": 600,  # one sweep on every rank: hybrid banks come in rounds
            "chunk_rows": 64,
            "host_gib": 1.0,
        }
        requests = requests_of(ranks.rank)
        expected = scores(build_engine(EngineConfig(**settings, residency="resident")), requests)
        choices = ["offloaded"] if ranks.size == 1 else ["sharded", "hybrid", "resident:1,sharded:1,hybrid:2"]
        for choice in choices:
            config = EngineConfig(**settings, residency=choice)
            engine = build_engine(config, ranks if ranks.size == 1 else below(ranks, f"{number}-{choice}"))
            if not torch.equal(scores(engine, requests), expected):
                wrong.append(f"rank {ranks.rank}: {config}")
            engine.close()
    return wrong
