"""Achieved rates of the main operations at the shapes of one layer, through the same ops as a sweep.

Letters: T rows, D hidden, H query heads, G key/value heads, d head channels, E experts, I expert size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from .. import ops
from ..checkpoint import dummy_slots
from ..core import AtomicRequest, Int64Array, ModelSpec
from ..costmodel import Batch, Rows, layer_seconds, layer_work
from ..engine.banks import BankMemory
from ..engine.plan import SweepPlan, build_sweep_plan
from ..engine.sweep import attend, rope_rows, run_layer
from ..errors import UsageError
from ..forest import SHARE_NOTHING
from ..machine import Curve, MachineProfile
from ..memory import memory_plan
from ..models.decoder import Decoder
from ..models.weights import ExpertBank, LayerWeights, weights_from_slots
from ..ops.expert_rows import expert_rows
from ..residency.speed import with_chunks
from ..shapes import Shape, bank_shapes, block_slots, float8_slots, slot_shapes
from .timing import seconds

_FIT_LENGTH = 256  # tokens a request of the whole layers that are timed: attention is a small part of them
_VOCABULARY = 64  # the embedding is not measured
_NO_DRIFT = 1e-6
_HIDDEN = 1.1  # a layer of up to so many times its fixed time hides what it computes
_INPUTS = 2  # a product measured alone has inputs of its own, which in a sweep are what came before it


def one_layer(spec: ModelSpec) -> ModelSpec:
    """The first sparse layer of a model alone, without a window. UsageError: there is none."""
    sparse = next((layer for layer in spec.layers if layer.sparse), None)
    if sparse is None:
        raise UsageError(f"this {spec.family} model has no layer with experts: there is nothing to calibrate for")
    return replace(spec, layers=(replace(sparse, window=None),), vocab_size=_VOCABULARY, tie_embeddings=True)


def without_feed_forward(spec: ModelSpec) -> ModelSpec:
    """The same layers with attention alone."""
    layers = tuple(replace(layer, sparse=False) for layer in spec.layers)
    return replace(spec, layers=layers, dense_size=0, shared_size=0)


class LayerBench:
    """One layer with random weights on a device, and the operations in it; ``float8``: its linear maps and experts."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, budget_s: float, *, float8: bool = False
    ) -> None:
        self.spec = one_layer(spec)
        self.device, self.dtype, self._budget_s = device, dtype, budget_s
        self._layer, self._bank = self._weights(float8)
        self._decoder = Decoder(self.spec)
        self.precision = "float8" if float8 else str(dtype).removeprefix("torch.")

    def fits(self, rows: int) -> bool:
        """Whether so many rows at a time leave a GPU memory; a CPU swaps, which shows."""
        if self.device.type != "cuda":
            return True
        needed = _INPUTS * memory_plan(self.spec, self.dtype.itemsize, rows, rows).num_bytes
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return needed <= free + cached

    def gemm(self, rows: int) -> float:
        """FLOP/s of the QKV and output projections on ``rows`` rows, float8 rows being quantised on the way."""
        attention = self._layer.attention
        x_TD, wide_TQ = self._random(rows, attention.qkv.shape[1]), self._random(rows, attention.out.shape[1])
        taken_s = self._seconds(lambda: ops.linear(x_TD, attention.qkv))
        taken_s += self._seconds(lambda: ops.linear(wide_TQ, attention.out))
        return 2 * rows * sum(math.prod(matrix.shape) for matrix in (attention.qkv, attention.out)) / taken_s

    def grouped(self, tokens: int) -> float:
        """FLOP/s of both expert projections on ``tokens`` tokens, spread at random over the experts, by the kernels of
        an engine: in the weights' own precision rows are gathered and activated within them.
        """
        spec = self.spec
        ids_TK = torch.rand(tokens, spec.num_experts, device=self.device).topk(spec.top_k).indices
        return 6 * ids_TK.numel() * spec.hidden_size * spec.expert_size / self._expert_seconds(ids_TK)

    def _expert_seconds(self, ids_TK: torch.Tensor) -> float:
        """Rows that only align count as time, not as work."""
        spec, scales = self.spec, self._bank.scales
        if scales is None:
            x_TD, order = self._random(len(ids_TK), spec.hidden_size), ops.order_by_expert(ids_TK, spec.num_experts)
            return self._seconds(lambda: expert_rows(x_TD, order, self._bank.gate_up, self._bank.down))
        if scales[0].ndim == 4:
            bank, rows = (
                ops.BlockBank.of(self._bank.gate_up, self._bank.down, scales),
                ops.aligned_rows(ids_TK, spec.num_experts),
            )
            x, hidden = (
                ops.quantize_groups(self._random(len(rows.expert), n)) for n in (spec.hidden_size, spec.expert_size)
            )
            taken_s = self._seconds(lambda: bank.times_gate_up(*x, rows.expert, self.dtype))
            return taken_s + self._seconds(lambda: bank.times_down(*hidden, rows.expert, self.dtype))
        ends = torch.bincount(ids_TK.flatten(), minlength=spec.num_experts).cumsum(0).to(torch.int32)
        x_RD, hidden_RI = (self._random(ids_TK.numel(), n) for n in (spec.hidden_size, spec.expert_size))
        taken_s = self._scaled_product(x_RD, self._bank.gate_up, scales[0], ends)
        return taken_s + self._scaled_product(hidden_RI, self._bank.down, scales[1], ends)

    def attention(self, length: int, tokens: int, chunk_rows: int) -> float:
        """FLOP/s of causal attention over sequences of about ``length`` tokens, ``tokens`` in all or one sequence, as a
        sweep calls it: no two of the same length, and cut where ``chunk_rows`` rows end.
        """
        spec, lengths = self.spec, alike(length, max(length, tokens))
        total = int(lengths.sum())
        plan = self._plan(lengths, chunk_rows)
        q_THd = self._random(total, spec.num_heads, spec.head_dim)
        k_TGd, v_TGd = (self._random(total, spec.num_kv_heads, spec.head_dim) for _ in "kv")

        def work() -> None:
            for chunk in plan.last_chunks:
                attend(self._decoder, q_THd[chunk.rows], k_TGd, v_TGd, chunk)

        return 4 * spec.num_heads * spec.head_dim * Rows.of(0, lengths).num_pairs(None) / self._seconds(work)

    def layer(self, tokens: int, chunk_rows: int) -> float:
        """Seconds of the whole layer on ``tokens`` tokens, every row carried, and of the norm of its input."""
        plan = self._plan(alike(_FIT_LENGTH, tokens), chunk_rows)
        x_TD, rope = self._random(tokens, self.spec.hidden_size), rope_rows(plan, self.dtype)

        def work() -> None:
            hidden = self._decoder.hidden(self._layer.attention, x_TD)
            run_layer(plan, self._decoder, self._layer, None, self._bank, 0, hidden, rope)

        return self._seconds(work)

    def _plan(self, lengths: Int64Array, chunk_rows: int) -> SweepPlan:
        """Of requests of these lengths that share nothing, every row carried."""
        tokens = int(lengths.sum())
        ids = np.random.default_rng(0).integers(0, _VOCABULARY, tokens).astype(np.int32)
        requests = [AtomicRequest.candidates(part, [0]) for part in np.split(ids, lengths.cumsum()[:-1])]
        memory = memory_plan(self.spec, self.dtype.itemsize, tokens, chunk_rows)
        return build_sweep_plan(
            requests, [""] * len(requests), self.spec, SHARE_NOTHING, memory, self.device, prune_last=False
        )

    def elementwise(self, profile: MachineProfile, tokens: int) -> tuple[float, float]:
        """Bytes/s that all of a layer but its products reaches on ``tokens`` rows at once; and by which share of the
        layer's time its parts take longer alone.

        What the layer's time leaves beside the products, which ``profile`` knows, is its time; but at least that of the
        bytes outside of the feed-forward, whose gather and activation may be in the products already, at the bandwidth
        of a plain copy. Nothing is known of it where a layer takes no longer than its launches.
        """
        batch, at_once = layer_batch(tokens), with_chunks(profile, tokens)
        parts = layer_seconds(self.spec, 0, batch, at_once, self.precision)
        known_s = sum(taken for part, taken in parts.items() if part != "elementwise")
        moved, least = (
            layer_work(spec, 0, batch, self.precision)["elementwise"].bytes
            for spec in (self.spec, without_feed_forward(self.spec))
        )
        least_s = least / profile.memory_bandwidth
        taken_s = self.layer(tokens, tokens)
        if taken_s <= _HIDDEN * profile.layer_overhead_s:
            return moved / least_s, 0.0
        left_s = taken_s - known_s - (profile.layer_overhead_s if self.device.type == "cpu" else 0.0)
        return moved / max(left_s, least_s), max(0.0, least_s - left_s) / taken_s

    def memory(self, num_bytes: int) -> float:
        """Bytes/s of a plain copy within the device, read and written."""
        source = torch.empty(num_bytes, dtype=torch.uint8, device=self.device).zero_()
        target = torch.empty_like(source)
        return 2 * num_bytes / self._seconds(lambda: target.copy_(source))

    def _scaled_product(
        self, rows_RC: torch.Tensor, weight_ENC: torch.Tensor, scale_EN: torch.Tensor, ends: torch.Tensor
    ) -> float:
        """Of rows that are quantised already, where the device multiplies such."""
        rows, scale_R = ops.quantize_rows(rows_RC) if ops.has_float8(self.device) else (rows_RC, None)
        return self._seconds(lambda: ops.scaled_grouped_mm(rows, scale_R, weight_ENC, scale_EN, ends, self.dtype))

    def _seconds(self, work: Callable[[], object]) -> float:
        return seconds(work, self.device, self._budget_s)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()

    def _weights(self, float8: bool) -> tuple[LayerWeights, ExpertBank]:
        """The banks are those that an engine would have here."""
        shapes, spec = slot_shapes(self.spec) | bank_shapes(self.spec), self.spec
        blocks = float8 and ops.blocks_refused(spec.hidden_size, spec.expert_size, self.dtype, self.device) is None
        banks = BankMemory(
            spec, ["resident"], dtype=ops.FLOAT8 if float8 else self.dtype, device=self.device, blocks=blocks
        )

        def allocate(slot: str, shape: Shape) -> torch.Tensor:
            if slot.startswith("banks."):
                return banks.allocate(slot, shape)
            return torch.empty(shape, dtype=self.dtype, device=self.device)

        slots = dummy_slots(shapes, allocate, top_k=spec.top_k, device=self.device)
        # A layer that is timed adds its attention to the same rows again and again, which would make those of a request
        # equal, and their experts the same few.
        slots["layers.0.out"].mul_(_NO_DRIFT)
        source = banks.source()
        source.begin_sweep()
        bank = source.acquire(0)
        assert bank is not None
        source.close()
        quantised: dict[str, ops.Matrix] = {}
        if float8:
            quantised |= {slot: ops.Float8Rows.of(slots[slot]) for slot in float8_slots(shapes)}
        if blocks and spec.float8_blocks and ops.block_linear_refused(self.dtype, self.device) is None:
            quantised |= {slot: ops.Float8Blocks.of(slots[slot]) for slot in block_slots(spec)}
        return weights_from_slots(self.spec, {**slots, **quantised}).layers[0], bank


def layer_batch(tokens: int) -> Batch:
    """The batch that ``LayerBench.layer`` times, as the cost model sees it."""
    rows = Rows.of(0, alike(_FIT_LENGTH, tokens))
    return Batch(rows, rows, len(rows.length), 2 * len(rows.length))


def alike(length: int, tokens: int) -> Int64Array:
    """``tokens`` tokens as lengths that differ by up to a fifth around ``length``: equal ones would meet kernels that
    compute sequences of one shape together, and in real sweeps few are equal.
    """
    count = max(1, round(tokens / length))
    ends = np.linspace(0.8, 1.2, count).cumsum()
    lengths: Int64Array = np.diff((ends * tokens / ends[-1]).round().astype(np.int64), prepend=0)
    return lengths


def curve(sizes: list[tuple[float, float]]) -> Curve:
    """From (size, rate) points, sizes that repeat left out."""
    return Curve.of(list(dict(sizes).items()))
