"""The tensors of a decoder: their names inside this project (slots), their shapes, and the records that the
mathematics reads.

Letters: D hidden, V vocabulary, H query heads, G key/value heads, d head channels, E experts, I expert size, F dense
size, S shared-expert size. Projections that read the same input are stored as one matrix: ``qkv`` rows are queries,
keys, values; ``gate_up`` rows are gate, then up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..core import ModelSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """All routed experts of one layer: ``gate_up`` [E, 2I, D] and ``down`` [E, D, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(H + 2G) d, D]
    out: torch.Tensor  # [D, H d]
    qkv_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None  # [d] a head, or [H d] over the full width
    k_norm: torch.Tensor | None = None  # [d] a head, or [G d] over the full width


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A SwiGLU feed-forward: ``gate_up`` [2F, D], ``down`` [D, F]."""

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """What a sparse layer keeps beside its bank: the router [E, D] and, in some families, a gated shared expert."""

    router: torch.Tensor
    shared: DenseWeights | None = None
    shared_gate: torch.Tensor | None = None  # [1, D]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention: AttentionWeights
    ffn_norm: torch.Tensor  # [D]
    ffn: MoeWeights | DenseWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Everything but the expert banks, which a bank source hands out layer by layer."""

    embed: torch.Tensor  # [V, D]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [D]
    lm_head: torch.Tensor  # [V, D]; the same storage as ``embed`` where the model ties them


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


def bank_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """The slots of the expert banks, ``banks.<layer>.gate_up`` and ``banks.<layer>.down``, with their shapes."""
    gate_up = (spec.num_experts, 2 * spec.expert_size, spec.hidden_size)
    down = (spec.num_experts, spec.hidden_size, spec.expert_size)
    sparse = [index for index, layer in enumerate(spec.layers) if layer.sparse]
    return {f"banks.{i}.{name}": shape for i in sparse for name, shape in (("gate_up", gate_up), ("down", down))}


def weights_from_slots(spec: ModelSpec, slots: Mapping[str, torch.Tensor]) -> ModelWeights:
    """Arrange filled slots as the records that the mathematics reads; no copy."""
    layers = tuple(_layer_from_slots(spec, index, slots) for index in range(spec.num_layers))
    return ModelWeights(slots["embed"], layers, slots["final_norm"], slots.get("lm_head", slots["embed"]))


def _layer_from_slots(spec: ModelSpec, index: int, slots: Mapping[str, torch.Tensor]) -> LayerWeights:
    prefix = f"layers.{index}."
    mine = {name.removeprefix(prefix): tensor for name, tensor in slots.items() if name.startswith(prefix)}
    attention = AttentionWeights(
        norm=mine["attn_norm"],
        qkv=mine["qkv"],
        out=mine["out"],
        **{name: mine.get(name) for name in ("qkv_bias", "out_bias", "q_norm", "k_norm")},
    )
    ffn: MoeWeights | DenseWeights
    if not spec.layers[index].sparse:
        ffn = DenseWeights(mine["gate_up"], mine["down"])
    elif spec.shared_size:
        ffn = MoeWeights(mine["router"], DenseWeights(mine["shared.gate_up"], mine["shared.down"]), mine["shared.gate"])
    else:
        ffn = MoeWeights(mine["router"])
    return LayerWeights(attention, mine["ffn_norm"], ffn)
