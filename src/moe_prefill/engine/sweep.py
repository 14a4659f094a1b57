"""One sweep: every row of a packed batch through all layers, layer by layer. No host synchronisation in here.

Letters: T computed rows, N rows of the forest (those and the ones from the pool), D hidden, H query heads, G key/value
heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import ops
from ..experts import BankSource
from ..models.decoder import Decoder, Hidden, LayerOutput, Rope
from ..models.weights import ExpertBank, LayerWeights, ModelWeights
from .cores import ONE_BY_ONE, Cores
from .head import HeadPlan
from .kv import PoolTensors
from .plan import DeviceCall, DeviceChunk, RowBlock, SweepPlan


@dataclass(frozen=True, slots=True)
class GroupOutput:
    """What a HeadPlan asked for, on the device: pair logits float32 [P], and over the vocabulary log-partitions [S]
    and top-k [S, K].
    """

    logits: torch.Tensor
    log_z: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logits: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SweepOutput:
    candidates: GroupOutput | None
    vocabulary: GroupOutput | None


def run_sweep(
    plan: SweepPlan,
    decoder: Decoder,
    weights: ModelWeights,
    banks: BankSource[ExpertBank],
    on_layer: Callable[[], None] | None = None,
    cores: Cores = ONE_BY_ONE,
    pool: PoolTensors | None = None,
) -> SweepOutput:
    """Compute what the plan asks; returns tensors still being computed on the current stream. ``on_layer`` is called
    when a layer has been enqueued. ``pool`` has what the plan reads from it and takes what it leaves.
    """
    hidden = embedded(plan, decoder, weights)
    rope = rope_rows(plan, hidden.residual.dtype)
    banks.begin_sweep()
    for index, (layer, ahead) in enumerate(weights.with_next):
        bank = banks.acquire(index)
        hidden = run_layer(plan, decoder, layer, ahead, bank, index, hidden, rope, cores, pool)
        banks.release(index)
        if on_layer is not None:
            on_layer()
    banks.end_sweep()
    return read_head(plan, decoder, weights, hidden.residual)


def run_without_tokens(
    num_layers: int, banks: BankSource[ExpertBank], on_layer: Callable[[], None] | None = None
) -> None:
    """A rank's part of a round in which it has nothing to compute: its banks move all the same, for its peers."""
    banks.begin_sweep()
    for index in range(num_layers):
        banks.acquire(index)
        banks.release(index)
        if on_layer is not None:
            on_layer()
    banks.end_sweep()


def embedded(plan: SweepPlan, decoder: Decoder, weights: ModelWeights) -> Hidden:
    """The tokens' embeddings, and their norm for the first layer."""
    return decoder.hidden(weights.layers[0].attention, weights.embed.index_select(0, plan.tokens))


def run_layer(
    plan: SweepPlan,
    decoder: Decoder,
    layer: LayerWeights,
    ahead: LayerWeights | None,
    bank: ExpertBank | None,
    index: int,
    hidden: Hidden,
    rope: Rope,
    cores: Cores = ONE_BY_ONE,
    pool: PoolTensors | None = None,
) -> Hidden:
    """The rows after layer ``index``, normed for the layer ``ahead``: ``hidden`` overwritten, or in the last layer only
    the rows that it carries.
    """
    x_TD, normed = hidden.residual, hidden.normed
    assert normed is not None, "a layer needs the norm of its input"
    kv = keys_values(plan, decoder, layer, hidden, rope, cores)
    if plan.pool is not None:
        assert pool is not None
        pool.exchange(index, plan.pool, kv)
    k, v = kv.unbind(1)
    last = index == decoder.spec.num_layers - 1
    chunks = plan.last_chunks if last else plan.chunks_by_window[decoder.spec.layers[index].window]
    out = LayerOutput(
        x_TD.new_empty(plan.last_rows, x_TD.shape[1]) if last else x_TD,
        None if ahead is None else decoder.norm_into(ahead.attention, normed),
    )

    def compute(chunk: DeviceChunk) -> None:
        residual = x_TD[chunk.rows]
        q = decoder.queries(layer.attention, normed[chunk.rows], rope[chunk.rows])
        attended = attend(decoder, q, k, v, chunk)
        decoder.finish(layer, attended, residual, bank, out[chunk.target])  # only now its rows are overwritten

    cores.each(compute, chunks)
    return Hidden(out.residual, None if ahead is None else normed)


def keys_values(
    plan: SweepPlan,
    decoder: Decoder,
    layer: LayerWeights,
    hidden: Hidden,
    rope: Rope,
    cores: Cores = ONE_BY_ONE,
) -> torch.Tensor:
    """K and V of every row, [N, 2, G, d], rows of the pool still unset: with the rows between layers, the only
    per-token memory of a layer.
    """
    total, normed = plan.forest.num_tokens, hidden.normed
    assert normed is not None, "a layer needs the norm of its input"
    kv = hidden.residual.new_empty(total, 2, decoder.spec.num_kv_heads, decoder.spec.head_dim)

    def compute(block: RowBlock) -> None:
        rows, keys = block.rows, block.keys
        if isinstance(keys, slice):
            decoder.keys_values(layer.attention, normed[rows], rope[rows], kv[keys])
        else:
            kv[keys] = decoder.keys_values(layer.attention, normed[rows], rope[rows])

    cores.each(compute, plan.row_blocks)
    return kv


def attend(decoder: Decoder, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: DeviceChunk) -> torch.Tensor:
    """Attention of a chunk's queries to their paths: the diagonal, then each level of ancestors, merged in float32."""
    diagonal = [call_attention(decoder, q, k, v, call) for call in chunk.diagonal]
    out, lse = diagonal[0] if len(diagonal) == 1 else (torch.cat(parts) for parts in zip(*diagonal, strict=True))
    if not chunk.levels:
        return out
    # Rounded once at the end: by the merge itself where there is one only.
    wide, lse = out if len(chunk.levels) == 1 else out.float(), lse.contiguous()
    for call in chunk.levels:
        ops.merge_(wide[call.rows], lse[call.rows], *call_attention(decoder, q, k, v, call))
    return wide.to(q.dtype)


def call_attention(
    decoder: Decoder, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: DeviceCall
) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.attention(
        q[call.rows],
        k[call.keys],
        v[call.keys],
        call.spans,
        causal=call.causal,
        window=call.window,
        scale=decoder.scale,
        need_lse=call.merged,
    )


def rope_rows(plan: SweepPlan, dtype: torch.dtype) -> Rope:
    """Cosines and sines of every packed row; the same in every layer."""
    own = plan.rope.inv_freq[0] if plan.rope.row is None else plan.rope.inv_freq.index_select(0, plan.rope.row)
    return Rope(*ops.rope_tables(plan.positions, own, plan.rope.factor, dtype))


def read_head(plan: SweepPlan, decoder: Decoder, weights: ModelWeights, x_AD: torch.Tensor) -> SweepOutput:
    """Final norm and LM head, only for asked rows: the candidates' rows of the head, or all of it where the
    vocabulary is asked.
    """
    candidates = plan.candidates and _read_candidates(plan.candidates, decoder, weights, x_AD)
    vocabulary = plan.vocabulary and _read_vocabulary(plan.vocabulary, decoder, weights, x_AD)
    return SweepOutput(candidates or None, vocabulary or None)


def _final(head: HeadPlan, decoder: Decoder, weights: ModelWeights, x_AD: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x_AD.index_select(0, head.rows), weights.final_norm, decoder.spec.norm_eps)


def _read_candidates(head: HeadPlan, decoder: Decoder, weights: ModelWeights, x_AD: torch.Tensor) -> GroupOutput:
    normed = _final(head, decoder, weights, x_AD)
    return GroupOutput(
        ops.candidate_logits(normed, weights.lm_head, head.pair_row, head.pair_id, head.unique, head.pair_unique)
    )


def _read_vocabulary(head: HeadPlan, decoder: Decoder, weights: ModelWeights, x_AD: torch.Tensor) -> GroupOutput:
    normed = _final(head, decoder, weights, x_AD)
    return GroupOutput(
        *ops.vocabulary_scores(
            normed,
            weights.lm_head,
            head.pair_row,
            head.pair_id,
            head.bounds,
            rows_per_block=head.rows_per_block,
            top_k=head.top_k,
        )
    )
