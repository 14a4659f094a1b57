"""FLOPs and bytes of each part of a layer.

Bytes are those of our own composition of operations: what each reads and writes in device memory, weights included.
Letters: D hidden, V vocabulary, K top-k, I expert size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..core import ModelSpec
from .batch import Batch, Rows
from .flops import LayerFlops, carried_rows, head_flops, layer_flops

Part = Literal["qkv", "attention", "out", "router", "experts", "dense", "elementwise"]
PARTS: tuple[Part, ...] = get_args(Part)

EXPERT_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}  # of an element of the experts' weights and inputs
ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float8": 2}  # of all other elements


@dataclass(frozen=True, slots=True)
class Work:
    """What a part has to do: exact FLOPs, and bytes moved in device memory."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Work(0, 0)


def layer_work(spec: ModelSpec, index: int, batch: Batch, precision: str) -> dict[Part, Work]:
    """Every part of layer ``index``; a part that the layer lacks is NOTHING. ``precision`` is that of the experts."""
    flops, carried = layer_flops(spec, index), carried_rows(spec, index, batch)
    window, tokens, rows = spec.layers[index].window, batch.num_tokens, carried.num_rows
    d_model, q_width, kv_width = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    a, e = ACTIVATION_BYTES[precision], EXPERT_BYTES[precision]
    qkv = tokens * (d_model + 2 * kv_width) + rows * (d_model + q_width) + d_model * (q_width + 2 * kv_width)
    return {
        "qkv": Work(flops.keys_values * tokens + flops.queries * rows, a * qkv),
        "attention": attention_work(spec, flops, carried, window, a),
        "out": Work(flops.output * rows, a * (rows * (q_width + d_model) + q_width * d_model)),
        **_feed_forward(spec, flops, rows, a, e),
        "elementwise": Work(0, _elementwise(spec, index, batch, carried, precision)),
    }


def attention_work(spec: ModelSpec, flops: LayerFlops, rows: Rows, window: int | None, element: int) -> Work:
    """QK and PV over the pairs that are seen; queries, outputs, and each run's keys and values once."""
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    keys = int((rows.keys(window) * rows.count).sum())
    moved = element * (2 * rows.num_rows * q_width + 2 * keys * kv_width)
    return Work(flops.attention_pair * rows.num_pairs(window), moved)


def head_work(spec: ModelSpec, batch: Batch, precision: str) -> Work:
    """The LM head rows that are asked; logits are float32."""
    element = ACTIVATION_BYTES[precision]
    read = min(batch.head_rows, spec.vocab_size) * spec.hidden_size + batch.asked_rows * spec.hidden_size
    return Work(head_flops(spec, batch), element * read + 4 * batch.head_rows)


def _feed_forward(spec: ModelSpec, flops: LayerFlops, rows: int, a: int, e: int) -> dict[Part, Work]:
    d_model = spec.hidden_size
    width = spec.shared_size if flops.experts else spec.dense_size
    dense = Work(flops.dense * rows, a * (rows * (2 * d_model + 3 * width) + 3 * d_model * width))
    if not flops.experts:
        return {"router": NOTHING, "experts": NOTHING, "dense": dense}
    router = Work(flops.router * rows, a * (rows * (d_model + spec.num_experts) + d_model * spec.num_experts))
    touched = min(rows * spec.top_k, spec.num_experts) * 3 * spec.expert_size * d_model
    moved = rows * spec.top_k * (e * (d_model + spec.expert_size) + a * (2 * spec.expert_size + d_model))
    return {
        "router": router,
        "experts": Work(flops.experts * rows, moved + e * touched),
        "dense": dense if width else NOTHING,
    }


def _elementwise(spec: ModelSpec, index: int, batch: Batch, carried: Rows, precision: str) -> int:
    """Norms, rotation, residuals, merges, routing, sort, gather, SwiGLU, combine and, for float8, quantisation."""
    a, e, d_model = ACTIVATION_BYTES[precision], EXPERT_BYTES[precision], spec.hidden_size
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    tokens, rows = batch.num_tokens, carried.num_rows
    # The first layer norms its input; every layer but the last writes the norm of the next one's beside it.
    normed = (2 * tokens if index == 0 else 0) + (rows if index < spec.num_layers - 1 else 0)
    keys = a * (normed * d_model + 2 * tokens * kv_width)  # those norms, rotated keys
    queries = a * rows * (2 * q_width + 3 * d_model + 2 * d_model)  # rotation, residual, norm
    below = int((carried.length * carried.count)[carried.first > 0].sum())
    merges = 16 * q_width * below  # the first ancestor's: two float32 rows read, one written, one converted
    sparse = spec.layers[index].sparse
    top_k, width = (spec.top_k, spec.expert_size) if sparse else (0, 0)
    wide = spec.shared_size if sparse else spec.dense_size
    # Gather, SwiGLU, combine and 8-byte sort keys; then softmax, top-k, and combine's residual.
    routed = rows * top_k * (e * (2 * d_model + width) + a * (2 * width + d_model) + 64)
    routed += rows * (12 * spec.num_experts + a * 2 * d_model) if sparse else 0
    other = rows * a * 3 * (wide + d_model) if wide else 0
    quantised = rows * (a + e) * d_model if sparse and e < a else 0
    return keys + queries + merges + routed + other + quantised
