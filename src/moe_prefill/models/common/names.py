"""Where each tensor of a checkpoint goes: from published names to slots, and back for messages.

All names here are in transformers' spelling without the ``model.`` in front; a family that spells differently
translates first. Experts come one by one (``mlp.experts.<e>.gate_proj.weight`` [I, D]) or fused
(``mlp.experts.gate_up_proj`` [E, 2I, D]); both fill the same bank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from ...core import ModelSpec

_LAYER = re.compile(r"layers\.(0|[1-9]\d*)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(0|[1-9]\d*)\.(gate_proj|up_proj|down_proj)\.weight")
_IGNORED = re.compile(r"(?:.*\.)?rotary_emb\.inv_freq")
_FUSED = {"mlp.experts.gate_up_proj": "gate_up", "mlp.experts.down_proj": "down"}
_TOP = {"embed_tokens.weight": "embed", "norm.weight": "final_norm", "lm_head.weight": "lm_head"}


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor fills ``rows`` rows of a slot (None: the rest of them) from ``row`` on.

    With ``expert`` set, these are rows of that expert's matrix in a bank. ``parts``: how many matrices of equal height
    the tensor stacks, where each may have block scales of its own.
    """

    slot: str
    row: int = 0
    rows: int | None = None
    expert: int | None = None
    parts: int = 1


Place = Callable[[str], Placement | None]
Spelling = Callable[[str], str]


def ignorer(spec: ModelSpec) -> Callable[[str], bool]:
    """Whether a tensor without a place may be left over: the model computes it, or it repeats the tied embedding."""

    def ignorable(name: str) -> bool:
        return _IGNORED.fullmatch(name) is not None or (spec.tie_embeddings and name == "lm_head.weight")

    return ignorable


def placer(spec: ModelSpec, names: Container[str], spelling: Spelling = str) -> Place:
    """A function from a checkpoint's tensor name to its place, or None for a name this model does not have.

    ``names`` are all names of the checkpoint: where embeddings are tied, a file may hold either matrix or both.
    ``spelling`` translates a family's names to those of this module. Slots that the spec does not have (for example a
    bias) may be returned.
    """
    table = _layer_table(spec)

    def place(name: str) -> Placement | None:
        plain = spelling(name).removeprefix("model.")
        if plain == "lm_head.weight" and spec.tie_embeddings:
            has_embed = "model.embed_tokens.weight" in names or "embed_tokens.weight" in names
            return None if has_embed else Placement("embed")
        if plain in _TOP:
            return Placement(_TOP[plain])
        match = _LAYER.fullmatch(plain)
        return _place_in_layer(spec, table, match[1], match[2]) if match else None

    return place


def required(spec: ModelSpec) -> Iterator[tuple[str, Placement]]:
    """Every place that a checkpoint must fill, one expert at a time, with the common name of the tensor that fills it.

    Slots that the spec does not have may be among them, as with ``placer``.
    """
    for name, slot in _TOP.items():
        if slot != "lm_head":
            yield f"model.{name}", Placement(slot)
        elif not spec.tie_embeddings:
            yield name, Placement(slot)
    for index, layer in enumerate(spec.layers):
        prefix = f"model.layers.{index}."
        for rest, (slot, row, rows) in _layer_table(spec).items():
            yield prefix + rest, Placement(f"layers.{index}.{slot}", row, rows)
        for expert in range(spec.num_experts if layer.sparse else 0):
            for rest in ("gate_proj", "up_proj", "down_proj"):
                yield f"{prefix}mlp.experts.{expert}.{rest}.weight", _place_expert(spec, index, expert, rest)


def _place_in_layer(spec: ModelSpec, table: dict[str, Rows], layer: str, rest: str) -> Placement | None:
    if rest in table:
        slot, row, rows = table[rest]
        return Placement(f"layers.{layer}.{slot}", row, rows)
    if rest in _FUSED:
        return Placement(f"banks.{layer}.{_FUSED[rest]}", parts=2 if _FUSED[rest] == "gate_up" else 1)
    match = _EXPERT.fullmatch(rest)
    if match and int(match[1]) < spec.num_experts:
        return _place_expert(spec, int(layer), int(match[1]), match[2])
    return None


def _place_expert(spec: ModelSpec, layer: int, expert: int, projection: str) -> Placement:
    if projection == "down_proj":
        return Placement(f"banks.{layer}.down", 0, None, expert)
    row = 0 if projection == "gate_proj" else spec.expert_size
    return Placement(f"banks.{layer}.gate_up", row, spec.expert_size, expert)


Rows = tuple[str, int, int | None]  # slot within the layer, first row, number of rows


def _layer_table(spec: ModelSpec) -> dict[str, Rows]:
    """The tensors of a layer beside the routed experts."""
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    table: dict[str, Rows] = {
        "input_layernorm.weight": ("attn_norm", 0, None),
        "post_attention_layernorm.weight": ("ffn_norm", 0, None),
        "self_attn.o_proj.weight": ("out", 0, None),
        "self_attn.o_proj.bias": ("out_bias", 0, None),
        "self_attn.q_norm.weight": ("q_norm", 0, None),
        "self_attn.k_norm.weight": ("k_norm", 0, None),
        "mlp.gate.weight": ("router", 0, None),
        "mlp.shared_expert_gate.weight": ("shared.gate", 0, None),
    }
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        table[f"self_attn.q_proj.{kind}"] = (f"qkv{suffix}", 0, q_width)
        table[f"self_attn.k_proj.{kind}"] = (f"qkv{suffix}", q_width, kv_width)
        table[f"self_attn.v_proj.{kind}"] = (f"qkv{suffix}", q_width + kv_width, kv_width)
    for owner, slot, size in (("mlp", "", spec.dense_size), ("mlp.shared_expert", "shared.", spec.shared_size)):
        table[f"{owner}.gate_proj.weight"] = (f"{slot}gate_up", 0, size)
        table[f"{owner}.up_proj.weight"] = (f"{slot}gate_up", size, size)
        table[f"{owner}.down_proj.weight"] = (f"{slot}down", 0, None)
    return table
