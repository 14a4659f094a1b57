"""One strategy on the ranks of a benchmark, each rank a process: engines with the settings that are searched."""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.dist import open_process_group
from moe_prefill.engine import LocalEngine, build_engine
from moe_prefill.engine.build import pick_dtype
from moe_prefill.engine.load import open_model
from moe_prefill.errors import MoePrefillError
from moe_prefill.experts import Ranks
from moe_prefill.memory import memory_plan
from moe_prefill.strategies import Collectives, RankGroup, StrategyEngine, requested_share, strategy_engine
from moe_prefill.strategies.build import agreed_plan, load_rank

from .requests import longest_of
from .sides import ASYNCEP, Setting, Side


def settings_of(options: argparse.Namespace, side: Side) -> list[Setting]:
    """Largest first; where no sweep of the list holds the longest request, that request is a sweep."""
    micro = options.micro_batches if side.strategy == "pp+pp" else [1]
    sweeps = sorted({*options.sweeps, max(*options.sweeps, longest_of(options, side))}, reverse=True)
    sweeps = sweeps if side.sweep_tokens is None else [side.sweep_tokens]
    return [Setting(*each) for each in itertools.product(sweeps, sorted(options.chunks, reverse=True), micro)]


def config_of(options: argparse.Namespace, side: Side, setting: Setting | None = None) -> EngineConfig:
    """The settings of a rank's engine; without a ``setting`` its plan chooses the sizes."""
    sizes = {} if setting is None else {"max_sweep_tokens": setting.sweep_tokens, "chunk_rows": setting.chunk_rows}
    memory, host = side.hbm_gib or options.hbm_gib, options.host_gib
    if options.device == "cpu" and side.hbm_gib is not None:
        host = side.hbm_gib * side.gpus  # there the ranks' memory is the host's
    return EngineConfig(
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        load_format="dummy",
        num_layers=side.layers,
        dummy_skew=side.skew if side.skew != 1.0 else None,
        quantization=options.quantization,
        sharing="off",
        prune_last=False,
        residency=side.residency,
        transport=side.transport,  # type: ignore[arg-type]
        memory_gib=memory,
        host_gib=host,
        threads=1 if options.device == "cpu" else None,
        profile=options.profile_path if side.strategy == ASYNCEP else None,
        strategy=side.strategy,  # type: ignore[arg-type]
        micro_batches=setting.micro_batches if setting is not None else 4,
        **sizes,  # type: ignore[arg-type]
    )


class Rank:
    """One process of the benchmark: what it shares with the others, and the clock that they agree on."""

    def __init__(self, rank: int, size: int, options: argparse.Namespace, folder: str) -> None:
        self.options, self.rank, self.size = options, rank, size
        self.device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
        self.store = dist.FileStore(f"{folder}/store", self.size)
        open_process_group(self.store, rank, self.size, self.device)
        self.group = RankGroup.of_world(self.device)
        self.collectives = Collectives(self.group)

    def ranks(self, name: str) -> Ranks:
        """This rank among the others, meeting under a name that is used once."""
        return Ranks(self.rank, self.size, dist.PrefixStore(name, self.store))

    def seconds(self, engine: LocalEngine, requests: list[AtomicRequest]) -> float:
        """One run of a list of this rank's own, or of all ranks'; see ``timed``."""
        answers: list[object] = []
        taken_s = self.timed(lambda: answers.extend(self.answers(engine, requests)))
        assert len(answers) == len(requests), (len(answers), len(requests))
        assert not any(isinstance(answer, Exception) for answer in answers), answers
        return taken_s

    def answers(self, engine: LocalEngine, requests: list[AtomicRequest]) -> list[Any]:
        """Of this rank's requests; where ranks stage banks for one another all of them make equally many sweeps."""
        if engine.schedule != "rounds" or isinstance(engine, StrategyEngine):
            return list(engine.score(requests))
        members = list(engine.forming.sweeps(requests, range(len(requests))))
        sweeps = [[requests[index] for index in each] for each in members]
        sweeps += [[]] * (self.most(len(sweeps)) - len(sweeps))
        return [answer for results in engine.compute(sweeps) for answer in results]

    def timed(self, work: Callable[[], object]) -> float:
        """From when all ranks are ready until the last is done; the same number on all ranks."""
        self.synchronize()
        self.collectives.gather_host([0])
        start = time.perf_counter()
        work()
        self.synchronize()
        mine = time.perf_counter() - start
        return float(self.collectives.gather_host([int(1e9 * mine)]).max()) * 1e-9

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def total(self, value: int) -> int:
        return int(self.collectives.gather_host([value]).sum())

    def most(self, value: int) -> int:
        return int(self.collectives.gather_host([value]).max())


class Contender(ABC):
    """One side: its weights are loaded once, and an engine is made for every setting that fits."""

    def __init__(self, rank: Rank, side: Side) -> None:
        self.rank, self.side = rank, side
        self.settings: list[Setting] = []
        self.refused: dict[str, str] = {}

    @abstractmethod
    def engine(self, setting: Setting) -> AbstractContextManager[LocalEngine]:
        """An engine with these sizes, for the duration of the block."""

    def close(self) -> None:
        gc.collect()
        if self.rank.device.type == "cuda":
            torch.cuda.empty_cache()


class Baseline(Contender):
    def __init__(self, rank: Rank, side: Side) -> None:
        super().__init__(rank, side)
        spec, _ = open_model(rank.options.model, "dummy", side.layers)
        settings = settings_of(rank.options, side)
        config = config_of(rank.options, side, settings[0])
        dtype = pick_dtype(config.dtype, spec, rank.device)
        self.share = requested_share(config, spec, rank.rank, rank.size)
        self.plans = {}
        for setting in settings:
            try:
                self.plans[setting] = agreed_plan(config_of(rank.options, side, setting), self.share, rank.group, dtype)
            except MoePrefillError as error:
                self.refused[str(setting)] = str(error)
        self.settings = list(self.plans)
        if self.settings:
            self.weights, self.banks = load_rank(config, self.share, None, rank.device, dtype)

    @contextmanager
    def engine(self, setting: Setting) -> Iterator[LocalEngine]:
        config, plan = config_of(self.rank.options, self.side, setting), self.plans[setting]
        engine = strategy_engine(config, self.share, self.rank.group, self.weights, self.banks, plan)
        yield engine
        engine.close()

    def close(self) -> None:
        self.weights = self.banks = None  # type: ignore[assignment]
        super().close()


class AsyncEp(Contender):
    """Built once, with the largest sweep and chunks that fit; smaller settings lie within its memory."""

    def __init__(self, rank: Rank, side: Side) -> None:
        super().__init__(rank, side)
        wanted = settings_of(rank.options, side)
        self._engine: LocalEngine | None = None
        for number, built in enumerate(wanted):
            try:
                ranks = rank.ranks(f"{side}/{number}")
                self._engine = build_engine(config_of(rank.options, side, built), ranks)
            except MoePrefillError as error:
                self.refused[str(built)] = str(error)
                continue
            self.settings = [each for each in wanted[number:] if each.chunk_rows <= built.chunk_rows]
            break

    @contextmanager
    def engine(self, setting: Setting) -> Iterator[LocalEngine]:
        engine = self._engine
        assert engine is not None
        element = engine._weights.embed.element_size()
        engine.memory = memory_plan(engine.spec, element, setting.sweep_tokens, setting.chunk_rows)
        yield engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        super().close()


def contender_of(rank: Rank, side: Side) -> Contender:
    return AsyncEp(rank, side) if side.strategy == ASYNCEP else Baseline(rank, side)
