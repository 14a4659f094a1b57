"""The tensors of a decoder as numbers: their names inside this project (slots) and their shapes. Torch-free.

Letters: D hidden, V vocabulary, H query heads, G key/value heads, d head channels, E experts, I expert size, F dense
size, S shared-expert size. Projections that read the same input are stored as one matrix: ``qkv`` rows are queries,
keys, values; ``gate_up`` rows are gate, then up.
"""

from __future__ import annotations

from collections.abc import Mapping

from .core import ModelSpec

Shape = tuple[int, ...]


def slot_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every slot that a model of this spec fills, except the banks, with its shape."""
    d_model, q_width, kv_width = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, Shape] = {"embed": (spec.vocab_size, d_model), "final_norm": (d_model,)}
    if not spec.tie_embeddings:
        shapes["lm_head"] = (spec.vocab_size, d_model)
    norm_widths = {"none": None, "head": (spec.head_dim, spec.head_dim), "full": (q_width, kv_width)}[spec.qk_norm]
    for index, layer in enumerate(spec.layers):
        mine: dict[str, Shape] = {
            "attn_norm": (d_model,),
            "qkv": (q_width + 2 * kv_width, d_model),
            "out": (d_model, q_width),
            "ffn_norm": (d_model,),
        }
        if spec.qkv_bias:
            mine["qkv_bias"] = (q_width + 2 * kv_width,)
        if spec.out_bias:
            mine["out_bias"] = (d_model,)
        if norm_widths is not None:
            mine["q_norm"], mine["k_norm"] = (norm_widths[0],), (norm_widths[1],)
        if layer.sparse:
            mine["router"] = (spec.num_experts, d_model)
            if spec.shared_size:
                mine["shared.gate_up"] = (2 * spec.shared_size, d_model)
                mine["shared.down"] = (d_model, spec.shared_size)
                mine["shared.gate"] = (1, d_model)
        else:
            mine["gate_up"] = (2 * spec.dense_size, d_model)
            mine["down"] = (d_model, spec.dense_size)
        shapes.update({f"layers.{index}.{name}": shape for name, shape in mine.items()})
    return shapes


_LINEAR = ("qkv", "out", "gate_up", "down")


def linear_slots(shapes: Mapping[str, Shape]) -> list[str]:
    """The slots of linear maps beside the banks: projections, dense and shared feed-forwards; no router, no head."""
    return [slot for slot in shapes if slot.startswith("layers.") and slot.rpartition(".")[2] in _LINEAR]


def float8_slots(shapes: Mapping[str, Shape]) -> set[str]:
    """The slots beside the banks that are kept in float8 where the model is: linear maps whose sizes the products take.
    Embeddings, the head, routers and norms stay as they are.
    """
    return {slot for slot in linear_slots(shapes) if all(size % 16 == 0 for size in shapes[slot])}


def block_slots(spec: ModelSpec) -> set[str]:
    """The linear maps beside the banks that consist of whole blocks of 128 x 128, as do the matrices that one is made
    of: queries, keys and values, gate and up.
    """
    shapes = slot_shapes(spec)
    borders = {
        "qkv": (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim),
        "shared.gate_up": (spec.shared_size,),
        "gate_up": (spec.dense_size,),
    }
    return {
        slot
        for slot in linear_slots(shapes)
        if all(size % 128 == 0 for size in (*shapes[slot], *borders.get(slot.split(".", 2)[2], ())))
    }


def bank_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """The slots of the expert banks, ``banks.<layer>.gate_up`` and ``banks.<layer>.down``, with their shapes."""
    gate_up = (spec.num_experts, 2 * spec.expert_size, spec.hidden_size)
    down = (spec.num_experts, spec.hidden_size, spec.expert_size)
    sparse = [index for index, layer in enumerate(spec.layers) if layer.sparse]
    return {f"banks.{i}.{name}": shape for i in sparse for name, shape in (("gate_up", gate_up), ("down", down))}
