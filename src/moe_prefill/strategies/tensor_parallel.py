"""Attention split over heads, every rank with all tokens: tp+tp and tp+ep.

A layer has two all-reduces: after the output projection, and after the feed-forward, whose experts are split over their
channels (tp+tp) or by index (tp+ep). Letters as in the models room.
"""

from __future__ import annotations

import torch

from .. import ops
from ..models.decoder import Decoder, LayerOutput
from ..models.weights import DenseWeights, ExpertBank, LayerWeights
from .collectives import Collectives
from .share import Share


class TensorParallelDecoder(Decoder):
    """The mathematics of a rank's share, summed over ranks wherever a residual is written."""

    def __init__(self, share: Share, collectives: Collectives) -> None:
        super().__init__(share.spec)
        self._experts = share.experts
        self._splits_banks = len(share.experts) < share.whole.num_experts
        self._collectives = collectives

    def add_attended_(self, layer: LayerWeights, attended_THd: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        part = ops.linear(attended_THd.flatten(1), layer.attention.out, layer.attention.out_bias)
        return ops.add_rms_norm_(residual_TD, self._collectives.all_reduce(part), layer.ffn_norm, self.spec.norm_eps)

    def feed_forward(
        self,
        layer: LayerWeights,
        x_TD: torch.Tensor,
        normed_TD: torch.Tensor,
        bank: ExpertBank | None,
        out: LayerOutput,
    ) -> None:
        if isinstance(layer.ffn, DenseWeights):
            part = self.dense(layer.ffn, normed_TD)
        else:
            assert bank is not None, "a sparse layer needs its share of the expert bank"
            weights, ids = self.route(layer.ffn, normed_TD)
            base = torch.zeros_like(x_TD) if layer.ffn.shared is None else self.shared(layer.ffn, normed_TD)
            ids, num_rows = self._within_bank(ids)
            part = ops.experts(normed_TD, weights, ids, bank.gate_up, bank.down, base, bank.scales, num_rows=num_rows)
        ops.add_rms_norm(x_TD, self._collectives.all_reduce(part), out.residual, out.norm)

    def norm_all_heads(self, flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The mean square over all heads is the mean of the ranks' own: each holds equally many, and a key/value head
        that several hold is held equally often as any other.
        """
        wide = flat.float()
        mean = self._collectives.all_reduce(wide.square().mean(-1, keepdim=True)) / self._collectives.ranks.size
        return weight * (wide * torch.rsqrt(mean + self.spec.norm_eps)).to(flat.dtype)

    def _within_bank(self, ids_TK: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """Ids counted from this rank's first expert, those of other ranks moved past its last; how many are its own.

        Reads that count on the host: a chunk's rows must be allocated for it.
        """
        if not self._splits_banks:
            return ids_TK, None
        own = (ids_TK >= self._experts.start) & (ids_TK < self._experts.stop)
        return torch.where(own, ids_TK - self._experts.start, len(self._experts)), int(own.sum())
