"""The mathematics of a decoder layer, for every family: which of its parts are there is said by the ModelSpec and the
weights.

Letters: T rows, D hidden, H query heads, G key/value heads, d head channels, r rotated channels. No rank, stream or
file here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import ops
from ..core import ModelSpec
from .weights import AttentionWeights, DenseWeights, ExpertBank, LayerWeights, MoeWeights


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosines and sines [T, r / 2] of the rows at hand, in the model's dtype."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> Rope:
        return Rope(self.cos[rows], self.sin[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """Rows between layers: the residual [T, D], and its norm as the layer to come takes it. Both are overwritten."""

    residual: torch.Tensor
    normed: ops.Rows | None  # None: no layer is to come


@dataclass(frozen=True, slots=True, eq=False)
class LayerOutput:
    """Where a layer writes rows: the residual [T, D] and, where a layer is to come, its norm."""

    residual: torch.Tensor
    norm: ops.NormInto | None = None

    def __getitem__(self, rows: slice) -> LayerOutput:
        return LayerOutput(self.residual[rows], None if self.norm is None else self.norm[rows])


class Decoder:
    """Pure functions of rows and weights for one ModelSpec."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.scale = spec.head_dim**-0.5
        self._q_width = spec.num_heads * spec.head_dim
        self._kv_width = spec.num_kv_heads * spec.head_dim

    def hidden(self, weights: AttentionWeights, x_TD: torch.Tensor) -> Hidden:
        """Residual rows that no layer here has written, and their norm as the QKV product of the layer to come takes
        it.
        """
        return Hidden(x_TD, ops.rms_norm_for(x_TD, weights.norm, self.spec.norm_eps, weights.qkv))

    def norm_into(self, weights: AttentionWeights, out: ops.Rows) -> ops.NormInto:
        """The norm for a layer to come, over rows that ``hidden`` gave: all layers' QKV products take one form."""
        return ops.NormInto(weights.norm, self.spec.norm_eps, out)

    def keys_values(
        self, weights: AttentionWeights, normed_TD: ops.Rows, rope: Rope, out_T2Gd: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Keys (normalised, rotated) and values of normed rows, [T, 2, G, d]; new, or computed in ``out``."""
        out = None if out_T2Gd is None else out_T2Gd.view(len(normed_TD), -1)
        flat = self._project(weights, normed_TD, self._q_width, self._q_width + 2 * self._kv_width, out)
        both = flat.view(len(flat), 2, -1, self.spec.head_dim)
        self._shape(flat[:, : self._kv_width], weights.k_norm, rope, both[:, 0])
        if self.spec.clip_qkv is not None:
            both[:, 1].clamp_(-self.spec.clip_qkv, self.spec.clip_qkv)
        return both

    def queries(self, weights: AttentionWeights, normed_TD: ops.Rows, rope: Rope) -> torch.Tensor:
        """Queries (normalised, rotated) [T, H, d] of normed rows."""
        return self._shape(self._project(weights, normed_TD, 0, self._q_width), weights.q_norm, rope)

    def finish(
        self,
        layer: LayerWeights,
        attended_THd: torch.Tensor,
        residual_TD: torch.Tensor,
        bank: ExpertBank | None,
        out: LayerOutput,
    ) -> None:
        """All of a layer behind its attention, written to ``out``, which may be the residual: that is used up."""
        normed = self.add_attended_(layer, attended_THd, residual_TD)
        self.feed_forward(layer, residual_TD, normed, bank, out)

    def add_attended_(self, layer: LayerWeights, attended_THd: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        """``residual += attended @ out`` in place; the norm of that sum, [T, D]."""
        out, bias, eps = layer.attention.out, layer.attention.out_bias, self.spec.norm_eps
        return ops.linear_add_rms_norm_(attended_THd.flatten(1), out, bias, residual_TD, layer.ffn_norm, eps)

    def feed_forward(
        self,
        layer: LayerWeights,
        x_TD: torch.Tensor,
        normed_TD: torch.Tensor,
        bank: ExpertBank | None,
        out: LayerOutput,
    ) -> None:
        """``x + experts(normed)`` in a sparse layer, ``x + dense(normed)`` in a dense one, written to ``out``."""
        if isinstance(layer.ffn, DenseWeights):
            ops.add_rms_norm(x_TD, self.dense(layer.ffn, normed_TD), out.residual, out.norm)
            return
        assert bank is not None, "a sparse layer needs its expert bank"
        weights, ids = self.route(layer.ffn, normed_TD)
        base = x_TD if layer.ffn.shared is None else x_TD + self.shared(layer.ffn, normed_TD)
        matrices = bank.gate_up, bank.down
        ops.experts(normed_TD, weights, ids, *matrices, base, bank.scales, out=out.residual, norm=out.norm)

    def route(self, weights: MoeWeights, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids [T, K] of the experts of normed rows."""
        return ops.route(
            x_TD,
            weights.router,
            self.spec.top_k,
            normalize=self.spec.norm_topk_prob,
            float32_weights=self.spec.router_weights_float32,
        )

    def dense(self, weights: DenseWeights, x_TD: torch.Tensor) -> torch.Tensor:
        """A SwiGLU feed-forward of normed rows; [T, D]."""
        return ops.linear(ops.swiglu(ops.linear(x_TD, weights.gate_up)), weights.down)

    def shared(self, weights: MoeWeights, x_TD: torch.Tensor) -> torch.Tensor:
        """The gated shared expert of normed rows; [T, D]."""
        assert weights.shared is not None
        assert weights.shared_gate is not None
        return torch.sigmoid(F.linear(x_TD, weights.shared_gate)) * self.dense(weights.shared, x_TD)

    def norm_all_heads(self, flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of queries or keys over all heads together."""
        return ops.rms_norm(flat, weight, self.spec.norm_eps)

    def _project(
        self, weights: AttentionWeights, normed_TD: ops.Rows, first: int, last: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        bias = None if weights.qkv_bias is None else weights.qkv_bias[first:last]
        return ops.linear(normed_TD, weights.qkv[first:last], bias, out)

    def _shape(
        self, flat: torch.Tensor, norm: torch.Tensor | None, rope: Rope, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.spec.qk_norm == "full":
            assert norm is not None
            flat, norm = self.norm_all_heads(flat, norm), None
        heads = self._heads(self._clip(flat))
        return ops.head_norm_rope(heads, norm, rope.cos, rope.sin, self.spec.norm_eps, out)

    def _heads(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(len(flat), -1, self.spec.head_dim)

    def _clip(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.spec.clip_qkv is None else x.clamp(-self.spec.clip_qkv, self.spec.clip_qkv)
