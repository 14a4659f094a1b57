"""Attention on each rank's own requests, experts split over ranks: dp+ep sends tokens to experts, dp+tp gathers them.

Ranks go through a layer in steps, one chunk of each; a rank whose chunks are done, or that has no requests, joins the
remaining steps without tokens. Attention, dense layers and shared experts are whole on every rank. Letters as in
``dispatch``; M rows received.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from .. import ops
from ..core import Int64Array
from ..models.decoder import Decoder, LayerOutput
from ..models.weights import DenseWeights, ExpertBank, LayerWeights
from ..residency import shard_of
from .collectives import Collectives
from .dispatch import destinations, grouped_sources, homes, pack_choices, send_order, unpack_choices
from .share import Share


@dataclass(frozen=True, slots=True, eq=False)
class RoutedRows:
    """A chunk on its way to the experts: normed rows [T, D], weights float32 and ids int64 [T, K] of their experts, the
    residual [T, D] that the weighted sum is added to, and where the sum goes.
    """

    normed: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    base: torch.Tensor
    out: LayerOutput


class DataParallelDecoder(Decoder):
    """A decoder whose experts are those of all ranks together; ``steps`` of the layer at hand are set beforehand."""

    def __init__(self, share: Share, collectives: Collectives, dtype: torch.dtype) -> None:
        super().__init__(share.whole)
        self._share = share
        self._collectives = collectives
        self._dtype = dtype

    def feed_forward(
        self,
        layer: LayerWeights,
        x_TD: torch.Tensor,
        normed_TD: torch.Tensor,
        bank: ExpertBank | None,
        out: LayerOutput,
    ) -> None:
        if isinstance(layer.ffn, DenseWeights):
            super().feed_forward(layer, x_TD, normed_TD, bank, out)
            return
        assert bank is not None, "a sparse layer needs its share of the expert bank"
        weights, ids = self.route(layer.ffn, normed_TD)
        base = x_TD if layer.ffn.shared is None else x_TD + self.shared(layer.ffn, normed_TD)
        self.step(RoutedRows(normed_TD, weights, ids, base, out), bank)

    def join(self, bank: ExpertBank) -> None:
        """One step without tokens of its own."""
        device, spec = self._collectives.ranks.device, self.spec
        nothing = torch.empty(0, spec.hidden_size, dtype=self._dtype, device=device)
        weights = torch.empty(0, spec.top_k, dtype=torch.float32, device=device)
        self.step(RoutedRows(nothing, weights, weights.long(), nothing, LayerOutput(nothing)), bank)

    def begin_layer(self, steps: Int64Array) -> None:
        """``steps``: rows of every rank in every step, [steps, N]."""
        self._steps = iter(steps)

    def outgoing(self, normed_TD: torch.Tensor, bank: ExpertBank) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows as they travel: as they are, or, where the experts are float8, quantised here rather than there: the
        bytes uint8 [T, D], and the scales.
        """
        if bank.scales is None:
            return normed_TD, None
        values, scale = ops.quantize_rows(normed_TD)
        return values.view(torch.uint8), scale

    def weighted_sums(
        self, rows_MD: torch.Tensor, choices: torch.Tensor, bank: ExpertBank, num_rows: int | None
    ) -> torch.Tensor:
        """What this rank's experts add to rows that arrived, ``num_rows`` of whose experts are here (None: all)."""
        weights_MK, ids_MK, scale_M = unpack_choices(choices, self.spec.top_k)
        return ops.experts(
            rows_MD if scale_M is None else rows_MD.view(ops.FLOAT8),
            weights_MK,
            ids_MK,
            bank.gate_up,
            bank.down,
            torch.zeros(rows_MD.shape, dtype=self._dtype, device=rows_MD.device),
            bank.scales,
            num_rows=num_rows,
            x_scale_T=scale_M,
        )

    @abstractmethod
    def step(self, rows: RoutedRows, bank: ExpertBank) -> None:
        """``rows.base`` and the weighted sum of their experts to ``rows.out``, all ranks taking part."""


class ExpertDispatch(DataParallelDecoder):
    """dp+ep: all-to-all with variable splits, there and back.

    A row travels once to a rank, with the ids and weights of all its experts there; the rank sends back one row, their
    weighted sum. Rows of the two exchanges are counted before they are sent, and the counts are read on the host: the
    one wait of a step, which the sizes of the receive buffers make necessary.
    """

    def __init__(self, share: Share, collectives: Collectives, dtype: torch.dtype, chunk_rows: int) -> None:
        super().__init__(share, collectives, dtype)
        size, experts = share.size, share.whole.num_experts
        starts = [shard_of(experts, rank, size).start for rank in range(size)]
        self._starts = torch.tensor(starts, device=collectives.ranks.device)
        self._most_pairs = 2 * chunk_rows * share.whole.top_k

    def step(self, rows: RoutedRows, bank: ExpertBank) -> None:
        to = destinations(rows.ids, self._starts)
        send, receive, pairs = self._exchange_counts(to.counts)
        rank_S, token_S = send_order(to, sum(send))
        own_SK = to.owner[token_S] == rank_S[:, None]
        ids_SK = torch.where(own_SK, rows.ids[token_S] - self._starts[rank_S, None], self.spec.num_experts)
        rows_TD, scale_T = self.outgoing(rows.normed, bank)
        packed = pack_choices(rows.weights[token_S], ids_SK, None if scale_T is None else scale_T[token_S])
        rows_MD = self._collectives.all_to_all(rows_TD[token_S], send, receive, "dispatch")
        choices = self._collectives.all_to_all(packed, send, receive, "dispatch")
        sums_MD = self._sums_by_source(rows_MD, choices, bank, receive, pairs)
        sums_SD = self._collectives.all_to_all(sums_MD, receive, send, "combine")
        if len(rows.base):
            shares, out = to.needed.t().to(torch.float32), rows.out
            ops.combine(sums_SD, homes(to), shares, rows.base, out.residual, out.norm)

    def _exchange_counts(self, counts_N2: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
        """Rows to send to every rank, rows to receive from it, and the pairs among these."""
        each = [1] * len(counts_N2)
        theirs = self._collectives.all_to_all(counts_N2, each, each, "counts")
        send, receive, pairs = torch.stack([counts_N2[:, 0], theirs[:, 0], theirs[:, 1]]).tolist()
        return send, receive, pairs

    def _sums_by_source(
        self, rows_MD: torch.Tensor, choices: torch.Tensor, bank: ExpertBank, rows: list[int], pairs: list[int]
    ) -> torch.Tensor:
        groups = grouped_sources(rows, pairs, self._most_pairs)
        sums = [self.weighted_sums(rows_MD[part], choices[part], bank, count) for part, count in groups]
        if len(sums) == 1:
            return sums[0]
        return torch.cat([rows_MD.new_empty(0, self.spec.hidden_size, dtype=self._dtype), *sums])


class TokenGather(DataParallelDecoder):
    """dp+tp: all ranks' rows are gathered, every rank computes its channels of all their experts, and the parts are
    summed where the rows came from (reduce-scatter). Ranks with fewer rows in a step pad to the longest.
    """

    def step(self, rows: RoutedRows, bank: ExpertBank) -> None:
        sizes = next(self._steps).tolist()
        longest, total = max(sizes), sum(sizes)
        assert len(rows.base) == sizes[self._share.rank], (len(rows.base), sizes)
        rows_TD, scale_T = self.outgoing(rows.normed, bank)
        choices = pack_choices(rows.weights, rows.ids, scale_T)
        nowhere = rows.ids.new_full((1, self.spec.top_k), self.spec.num_experts)
        zeros = torch.zeros_like(nowhere, dtype=torch.float32)
        elsewhere = pack_choices(zeros, nowhere, None if scale_T is None else zeros[:, 0])
        gathered = self._collectives.all_gather(_padded(rows_TD, longest, rows_TD.new_zeros(1, 1)))
        choices = self._collectives.all_gather(_padded(choices, longest, elsewhere))
        num_rows = None if total == len(gathered) else total * self.spec.top_k
        part = self.weighted_sums(gathered, choices, bank, num_rows)
        sums = self._collectives.reduce_scatter(part)[: len(rows.base)]
        ops.add_rms_norm(rows.base, sums, rows.out.residual, rows.out.norm)


def _padded(rows: torch.Tensor, length: int, filler: torch.Tensor) -> torch.Tensor:
    if len(rows) == length:
        return rows
    return torch.cat([rows, filler.expand(length - len(rows), rows.shape[1])])
