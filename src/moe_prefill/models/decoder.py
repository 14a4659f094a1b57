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


class Decoder:
    """Pure functions of rows and weights for one ModelSpec."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.scale = spec.head_dim**-0.5
        self._q_width = spec.num_heads * spec.head_dim
        self._kv_width = spec.num_kv_heads * spec.head_dim

    def keys_values(
        self, weights: AttentionWeights, x_TD: torch.Tensor, rope: Rope, out_T2Gd: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Keys (normalised, rotated) and values of residual rows, [T, 2, G, d]; new, or computed in ``out``."""
        normed = ops.rms_norm_for(x_TD, weights.norm, self.spec.norm_eps, weights.qkv)
        out = None if out_T2Gd is None else out_T2Gd.view(len(x_TD), -1)
        flat = self._project(weights, normed, self._q_width, self._q_width + 2 * self._kv_width, out)
        both = flat.view(len(flat), 2, -1, self.spec.head_dim)
        self._shape(flat[:, : self._kv_width], weights.k_norm, rope, both[:, 0])
        if self.spec.clip_qkv is not None:
            both[:, 1].clamp_(-self.spec.clip_qkv, self.spec.clip_qkv)
        return both

    def queries(self, weights: AttentionWeights, x_TD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Queries (normalised, rotated) [T, H, d] of residual rows."""
        normed = ops.rms_norm_for(x_TD, weights.norm, self.spec.norm_eps, weights.qkv)
        return self._shape(self._project(weights, normed, 0, self._q_width), weights.q_norm, rope)

    def finish(
        self,
        layer: LayerWeights,
        attended_THd: torch.Tensor,
        residual_TD: torch.Tensor,
        bank: ExpertBank | None,
        out_TD: torch.Tensor,
    ) -> None:
        """All of a layer behind its attention, written to ``out_TD``, which may be ``residual_TD``: that is used up."""
        normed = self.add_attended_(layer, attended_THd, residual_TD)
        self.feed_forward(layer, residual_TD, normed, bank, out_TD)

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
        out_TD: torch.Tensor,
    ) -> None:
        """``x + experts(normed)`` in a sparse layer, ``x + dense(normed)`` in a dense one, written to ``out_TD``."""
        if isinstance(layer.ffn, DenseWeights):
            torch.add(x_TD, self.dense(layer.ffn, normed_TD), out=out_TD)
            return
        assert bank is not None, "a sparse layer needs its expert bank"
        weights, ids = self.route(layer.ffn, normed_TD)
        base = x_TD if layer.ffn.shared is None else x_TD + self.shared(layer.ffn, normed_TD)
        ops.experts(normed_TD, weights, ids, bank.gate_up, bank.down, base, bank.scales, out=out_TD)

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
        self, weights: AttentionWeights, x_TD: ops.Rows, first: int, last: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        bias = None if weights.qkv_bias is None else weights.qkv_bias[first:last]
        return ops.linear(x_TD, weights.qkv[first:last], bias, out)

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
