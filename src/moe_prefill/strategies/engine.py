"""The engine of one rank under tp and dp: the plain engine's planning and answers around another way through a layer.

All ranks call ``score`` together. Under dp each has a list of its own, possibly empty; under tp (and pp, see
``pipeline``) all are given the same list, and all return its answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import EngineConfig
from ..core import AtomicRequest
from ..engine.local import Answer, LocalEngine
from ..engine.plan import SweepPlan
from ..engine.sweep import SweepOutput, embedded, read_head, rope_rows, run_layer
from ..experts import ResidentBanks
from ..memory import MemoryPlan
from ..models.decoder import Decoder, Hidden
from ..models.weights import ExpertBank, ModelWeights
from .collectives import Collectives
from .data_parallel import DataParallelDecoder
from .lockstep import Lockstep
from .share import Share


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankModel:
    """One rank's part of a model: its weights, and the decoder that computes a layer of them with the other ranks."""

    share: Share
    decoder: Decoder
    collectives: Collectives
    weights: ModelWeights
    banks: Sequence[ExpertBank | None]
    memory: MemoryPlan


class StrategyEngine(LocalEngine):
    """What the strategies have in common: a share of the weights, and collectives that are counted.

    ``traffic`` says what this device has sent so far, layer by layer.
    """

    def __init__(self, part: RankModel, config: EngineConfig) -> None:
        super().__init__(
            part.share.whole,
            part.weights,
            ResidentBanks(part.banks),
            part.memory,
            device=part.collectives.ranks.device,
            sharing=config.sharing,
            prune_last=config.prune_last,
            quantization="fp8" if config.quantization == "fp8" or part.share.whole.float8_blocks else None,
        )
        self.share = part.share
        self.schedule = "rounds" if part.share.is_data_parallel else "together"
        self.traffic = part.collectives.traffic
        self._decoder = part.decoder
        self._collectives = part.collectives

    @property
    def plan_digest(self) -> str:
        facts = f"{super().plan_digest} {self.share.name} {self.share.size}"
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def layer_done(self) -> None:
        if self.on_layer is not None:
            self.on_layer()


class TensorParallelEngine(StrategyEngine):
    """tp+tp, tp+ep: every rank computes every sweep, so all plans are the same and ranks are in step by themselves."""

    def _run(self, plan: SweepPlan) -> SweepOutput:
        hidden = embedded(plan, self._decoder, self._weights)
        rope = rope_rows(plan, hidden.residual.dtype)
        for index, (layer, ahead) in enumerate(self._weights.with_next):
            self.traffic.layer = index
            bank = self._banks.acquire(index)
            hidden = run_layer(plan, self._decoder, layer, ahead, bank, index, hidden, rope)
            self.layer_done()
        return read_head(plan, self._decoder, self._weights, hidden.residual)


class DataParallelEngine(StrategyEngine):
    """dp+ep, dp+tp: before a sweep, ranks tell one another its size on the host; a rank without one joins empty."""

    _decoder: DataParallelDecoder

    def score(self, requests: Sequence[AtomicRequest]) -> list[Answer]:
        answers = super().score(requests)
        with torch.inference_mode():
            while not (lockstep := self._next_sweep(0, 0)).is_over:
                self._through_layers(lockstep, None)
        return answers

    def _run(self, plan: SweepPlan) -> SweepOutput:
        hidden = self._through_layers(self._next_sweep(plan.forest.num_tokens, plan.last_rows), plan)
        assert hidden is not None
        return read_head(plan, self._decoder, self._weights, hidden.residual)

    def _run_empty(self) -> None:
        self._through_layers(self._next_sweep(0, 0), None)

    def _next_sweep(self, tokens: int, last_rows: int) -> Lockstep:
        return Lockstep(self._collectives.gather_host([tokens, last_rows]), self.memory.chunk_rows)

    def _through_layers(self, lockstep: Lockstep, plan: SweepPlan | None) -> Hidden | None:
        hidden = rope = None
        if plan is not None:
            hidden = embedded(plan, self._decoder, self._weights)
            rope = rope_rows(plan, hidden.residual.dtype)
        for index, (layer, ahead) in enumerate(self._weights.with_next):
            self.traffic.layer = index
            bank = self._banks.acquire(index)
            steps = lockstep.steps(last=index == self.spec.num_layers - 1)
            self._decoder.begin_layer(steps)
            if plan is not None and hidden is not None and rope is not None:
                hidden = run_layer(plan, self._decoder, layer, ahead, bank, index, hidden, rope)
            if bank is not None:
                for _ in range(int((steps[:, self.share.rank] == 0).sum())):
                    self._decoder.join(bank)
            self.layer_done()
        return hidden
