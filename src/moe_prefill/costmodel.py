"""True FLOPs: what had to be computed after sharing, 2 a multiply-add. Torch-free.

Counted: QKV, O, router, the routed and shared experts, QK and PV over causal pairs, the LM head rows that were asked.
Not counted: embedding, norms, pruned work, padding, recomputation, merges. A row at position p of its request sees p
+ 1 keys (or the window), wherever they were computed, so attention depends on positions alone and is exact under
sharing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .core import Int32Array, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFlops:
    """FLOPs of one row in one layer, part by part; ``attention_pair`` is for one (query, key) pair over all heads."""

    keys_values: int
    queries: int
    output: int
    router: int
    experts: int
    attention_pair: int

    @property
    def row(self) -> int:
        """Everything but attention."""
        return self.keys_values + self.queries + self.output + self.router + self.experts


def layer_flops(spec: ModelSpec, index: int) -> LayerFlops:
    """The parts of layer ``index``. Dense layers count their feed-forward under ``experts``."""
    d_model, q_width, kv_width = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    if spec.layers[index].sparse:
        router = 2 * d_model * spec.num_experts
        experts = 6 * d_model * (spec.top_k * spec.expert_size + spec.shared_size)
        experts += 2 * d_model if spec.shared_size else 0  # the shared expert's gate
    else:
        router, experts = 0, 6 * d_model * spec.dense_size
    return LayerFlops(
        keys_values=4 * d_model * kv_width,
        queries=2 * d_model * q_width,
        output=2 * d_model * q_width,
        router=router,
        experts=experts,
        attention_pair=4 * q_width,
    )


def attention_pairs(positions: Int32Array, window: int | None) -> int:
    """How many (query, key) pairs rows at these positions see."""
    seen = positions.astype(np.int64) + 1
    return int(seen.sum() if window is None else np.minimum(seen, window).sum())


def sweep_flops(spec: ModelSpec, positions: Int32Array, last_positions: Int32Array, head_rows: int) -> int:
    """FLOPs of one sweep.

    ``positions``: of every computed row. ``last_positions``: of the rows that the last layer carries beyond K and V.
    ``head_rows``: LM head rows read, summed over asked positions.
    """
    total = 2 * spec.hidden_size * head_rows
    pairs = {window: attention_pairs(positions, window) for window in {layer.window for layer in spec.layers}}
    final = spec.num_layers - 1
    for index, layer in enumerate(spec.layers):
        parts = layer_flops(spec, index)
        if index < final:
            total += parts.row * len(positions) + parts.attention_pair * pairs[layer.window]
        else:
            total += parts.keys_values * len(positions) + (parts.row - parts.keys_values) * len(last_positions)
            total += parts.attention_pair * attention_pairs(last_positions, layer.window)
    return total
