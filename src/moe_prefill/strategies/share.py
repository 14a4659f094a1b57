"""What one rank keeps of a model under a strategy: its sizes, its experts, its layers, and the cuts of its tensors.

A rank's part under tensor parallelism is itself the description of a smaller model (``Share.spec``), so the mathematics
of the models room computes it unchanged; only sums over ranks are added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..core import ModelSpec
from ..errors import UsageError
from ..residency import shard_of

Name = Literal["dp+ep", "dp+tp", "tp+ep", "tp+tp", "pp+pp"]
NAMES: tuple[Name, ...] = ("dp+ep", "dp+tp", "tp+ep", "tp+tp", "pp+pp")


@dataclass(frozen=True, slots=True)
class Cut:
    """These ranges of one dimension, one after the other."""

    dim: int
    ranges: tuple[range, ...]

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of the part."""
        return torch.cat([whole.narrow(self.dim, part.start, len(part)) for part in self.ranges], self.dim)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return (*whole[: self.dim], sum(map(len, self.ranges)), *whole[self.dim + 1 :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's part of ``whole``. ``spec``: its sizes. ``experts``: of every bank. ``layers``: the ones it computes.
    ``cuts``: by a slot's name within its layer.
    """

    name: Name
    rank: int
    size: int
    whole: ModelSpec
    spec: ModelSpec
    experts: range
    layers: range
    cuts: Mapping[str, Cut]

    @property
    def splits_attention(self) -> bool:
        return self.name.startswith("tp+")

    @property
    def is_data_parallel(self) -> bool:
        """Every rank has requests of its own; otherwise all are given the same ones."""
        return self.name.startswith("dp+")

    def holds(self, slot: str) -> bool:
        """Embedding, final norm and LM head are whole on every rank."""
        layer = slot.split(".")[1:2]
        return not layer or int(layer[0]) in self.layers

    def kept_shape(self, slot: str, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this rank's part of a slot it holds."""
        kept = (len(self.experts), *whole[1:]) if slot.startswith("banks.") else whole
        cut = self.cuts.get(within_layer(slot))
        return kept if cut is None else cut.shape(kept)

    def part(self, slot: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a slot; of a bank, ``tensor`` holds only its experts."""
        if self.splits_attention and self.rank > 0 and within_layer(slot) == "out_bias":
            return torch.zeros_like(tensor)  # summed over ranks, the bias is added once
        cut = self.cuts.get(within_layer(slot))
        return tensor if cut is None else cut.of(tensor)


def within_layer(slot: str) -> str:
    """``layers.3.shared.down`` is ``shared.down``, ``banks.3.down`` is ``bank.down``; others stay as they are."""
    kind, _, rest = slot.partition(".")
    inner = rest.partition(".")[2]
    return {"layers": inner, "banks": f"bank.{inner}"}.get(kind, slot)


def share_of(whole: ModelSpec, name: Name, rank: int, size: int) -> Share:
    """The part of ``rank``. UsageError, with the numbers, where the strategy cannot split these shapes so."""
    check(whole, name, size)
    spec = whole
    cuts: dict[str, Cut] = {}
    if name.startswith("tp+"):
        heads = _kv_heads(whole, rank, size)
        spec = replace(
            whole,
            num_heads=whole.num_heads // size,
            num_kv_heads=len(heads),
            dense_size=whole.dense_size // size,
            shared_size=whole.shared_size // size,
        )
        cuts |= _attention_cuts(whole, rank, size, heads)
        cuts |= _feed_forward_cuts("", 0, whole.dense_size, rank, size)
        cuts |= _feed_forward_cuts("shared.", 0, whole.shared_size, rank, size)
    if name.endswith("+tp"):
        spec = replace(spec, expert_size=whole.expert_size // size)
        cuts |= _feed_forward_cuts("bank.", 1, whole.expert_size, rank, size)
    return Share(
        name=name,
        rank=rank,
        size=size,
        whole=whole,
        spec=spec,
        experts=shard_of(whole.num_experts, rank, size) if name.endswith("+ep") else range(whole.num_experts),
        layers=shard_of(whole.num_layers, rank, size) if name == "pp+pp" else range(whole.num_layers),
        cuts=cuts,
    )


def check(spec: ModelSpec, name: Name, size: int) -> None:
    """UsageError where ``size`` ranks cannot share this model under the strategy."""
    attention, experts = name.split("+")
    if attention == "tp":
        _divides(name, size, "attention heads", spec.num_heads)
        if spec.num_sparse_layers < spec.num_layers:
            _divides(name, size, "channels of the dense layers", spec.dense_size)
        _divides(name, size, "channels of the shared expert", spec.shared_size)
    if experts == "tp":
        _divides(name, size, "channels of an expert", spec.expert_size)
    if experts == "ep" and spec.num_experts < size:
        raise UsageError(
            f"strategy {name} gives each of {size} ranks whole experts, and the model has {spec.num_experts}; use at "
            f"most {spec.num_experts} ranks or another strategy"
        )
    if attention == "pp" and spec.num_layers < size:
        raise UsageError(
            f"strategy {name} gives each of {size} ranks whole layers, and the model has {spec.num_layers}; use at "
            f"most {spec.num_layers} ranks or another strategy"
        )


def _divides(name: Name, size: int, what: str, count: int) -> None:
    if count % size:
        fewer = math.gcd(count, size)
        remedy = f"{fewer} ranks or another strategy" if fewer > 1 else "another number of ranks or another strategy"
        raise UsageError(
            f"strategy {name} splits {what} over {size} ranks, and {count} is not a multiple of {size}; use {remedy}"
        )


def _kv_heads(spec: ModelSpec, rank: int, size: int) -> list[int]:
    """The key/value heads that a rank's query heads read, each serving equally many of them.

    Neighbouring query heads share one. Where a rank's own are fewer, or begin in the middle of such a group, heads are
    held by several ranks; every head is then held equally often.
    """
    mine, group = spec.num_heads // size, spec.num_heads // spec.num_kv_heads
    block = math.gcd(mine, group)
    return [head // group for head in range(rank * mine, (rank + 1) * mine, block)]


def _attention_cuts(spec: ModelSpec, rank: int, size: int, kv_heads: list[int]) -> dict[str, Cut]:
    dim, mine = spec.head_dim, spec.num_heads // size
    q_width, kv_width = spec.num_heads * dim, spec.num_kv_heads * dim
    queries = range(rank * mine * dim, (rank + 1) * mine * dim)
    keys = tuple(range(head * dim, (head + 1) * dim) for head in kv_heads)
    first, second = (
        tuple(range(part.start + offset, part.stop + offset) for part in keys)
        for offset in (q_width, q_width + kv_width)
    )
    qkv = Cut(0, (queries, *first, *second))
    cuts = {"qkv": qkv, "qkv_bias": qkv, "out": Cut(1, (queries,))}
    if spec.qk_norm == "full":
        cuts |= {"q_norm": Cut(0, (queries,)), "k_norm": Cut(0, keys)}
    return cuts


def _feed_forward_cuts(prefix: str, dim: int, width: int, rank: int, size: int) -> dict[str, Cut]:
    """Of a SwiGLU feed-forward of ``width`` channels: its share of gate, of up, and of the columns of down."""
    mine = shard_of(width, rank, size)
    up = range(mine.start + width, mine.stop + width)
    return {f"{prefix}gate_up": Cut(dim, (mine, up)), f"{prefix}down": Cut(dim + 1, (mine,))}
