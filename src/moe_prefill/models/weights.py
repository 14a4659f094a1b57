"""The records of tensors that the mathematics reads, filled from slots (``shapes`` has their names, shapes and
letters).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core import ModelSpec
from ..ops import Matrix


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """All routed experts of one layer: ``gate_up`` [E, 2I, D] and ``down`` [E, D, I]; float8 ones with float32 scales,
    one a row or one a block.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None  # [E, 2I], or [E, 3, I / 128, D / 128]
    down_scale: torch.Tensor | None = None  # [E, D], or [E, 3, D / 128, I / 128]

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.gate_up_scale is None or self.down_scale is None:
            return None
        return self.gate_up_scale, self.down_scale


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    norm: torch.Tensor  # [D]
    qkv: Matrix  # [(H + 2G) d, D]
    out: Matrix  # [D, H d]
    qkv_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None  # [d] a head, or [H d] over the full width
    k_norm: torch.Tensor | None = None  # [d] a head, or [G d] over the full width


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A SwiGLU feed-forward: ``gate_up`` [2F, D], ``down`` [D, F]."""

    gate_up: Matrix
    down: Matrix


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

    @property
    def with_next(self) -> Iterator[tuple[LayerWeights, LayerWeights | None]]:
        """Each layer, and the one behind it, whose norm it writes."""
        return zip(self.layers, (*self.layers[1:], None), strict=True)


def weights_from_slots(spec: ModelSpec, slots: Mapping[str, Any]) -> ModelWeights:
    """Arrange filled slots (tensors, or float8 matrices for linear maps) as the records that the mathematics reads; no
    copy.
    """
    layers = tuple(_layer_from_slots(spec, index, slots) for index in range(spec.num_layers))
    return ModelWeights(slots["embed"], layers, slots["final_norm"], slots.get("lm_head", slots["embed"]))


def _layer_from_slots(spec: ModelSpec, index: int, slots: Mapping[str, Any]) -> LayerWeights:
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
