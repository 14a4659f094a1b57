"""True FLOPs: what had to be computed after sharing, 2 a multiply-add.

Counted: QKV, O, router, the routed and shared experts, QK and PV over causal pairs, the LM head rows that were asked.
Not counted: embedding, norms, pruned work, padding, recomputation, merges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import Int32Array, ModelSpec
from .batch import Batch, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFlops:
    """FLOPs of one row in one layer, part by part; ``attention_pair`` is for one (query, key) pair over all heads.

    ``experts``: the routed ones. ``dense``: the shared expert with its gate, or a dense layer's feed-forward.
    """

    keys_values: int
    queries: int
    output: int
    router: int
    experts: int
    dense: int
    attention_pair: int

    @property
    def row(self) -> int:
        """Everything but attention."""
        return self.keys_values + self.queries + self.output + self.router + self.experts + self.dense


def layer_flops(spec: ModelSpec, index: int) -> LayerFlops:
    """The parts of layer ``index``."""
    d_model, q_width, kv_width = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    if spec.layers[index].sparse:
        router, experts = 2 * d_model * spec.num_experts, 6 * d_model * spec.top_k * spec.expert_size
        dense = 6 * d_model * spec.shared_size + (2 * d_model if spec.shared_size else 0)
    else:
        router, experts, dense = 0, 0, 6 * d_model * spec.dense_size
    return LayerFlops(
        keys_values=4 * d_model * kv_width,
        queries=2 * d_model * q_width,
        output=2 * d_model * q_width,
        router=router,
        experts=experts,
        dense=dense,
        attention_pair=4 * q_width,
    )


def carried_rows(spec: ModelSpec, index: int, batch: Batch) -> Rows:
    """The rows of layer ``index`` that need more than K and V."""
    return batch.carried if index == spec.num_layers - 1 else batch.rows


def head_flops(spec: ModelSpec, batch: Batch) -> int:
    """FLOPs of the LM head's products: of the rows of its matrix that are read, summed over asked positions."""
    return 2 * spec.hidden_size * batch.head_rows


def batch_flops(spec: ModelSpec, batch: Batch) -> int:
    """FLOPs of one sweep over all layers and the head: what T, L_i and MFU count."""
    total, tokens = head_flops(spec, batch), batch.num_tokens
    pairs = {window: batch.rows.num_pairs(window) for window in {layer.window for layer in spec.layers}}
    for index, layer in enumerate(spec.layers):
        parts, carried = layer_flops(spec, index), carried_rows(spec, index, batch)
        seen = pairs[layer.window] if carried is batch.rows else carried.num_pairs(layer.window)
        total += parts.keys_values * tokens + (parts.row - parts.keys_values) * carried.num_rows
        total += parts.attention_pair * seen
    return total


def sweep_flops(spec: ModelSpec, positions: Int32Array, last_positions: Int32Array, head_rows: int) -> int:
    """FLOPs of one sweep, from positions.

    ``positions``: of every computed row. ``last_positions``: of the rows that the last layer carries beyond K and V.
    ``head_rows``: LM head rows read, summed over asked positions.
    """
    rows, carried = (Rows.of(*_runs(array)) for array in (positions, last_positions))
    return batch_flops(spec, Batch(rows, carried, 0, head_rows))


def _runs(positions: Int32Array) -> tuple[np.ndarray, np.ndarray]:
    """Runs of consecutive positions: firsts and lengths."""
    begins = np.flatnonzero(np.diff(positions.astype(np.int64), prepend=-2) != 1)
    return positions[begins], np.diff(begins, append=len(positions))
