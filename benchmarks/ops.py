"""Every operation of a layer alone: checked against its plain reference, timed beside a torch composition, and set
against the ceiling of the same run.

    python benchmarks/ops.py --out benchmarks/results/ops.json

On a GPU: the shapes of Qwen3-30B-A3B and Qwen3-235B-A22B, 8,192, 16,384 and 65,536 rows, bfloat16; times are those of
CUDA graphs, so that no launch is counted. On a CPU: small shapes, to try the script. Bytes are the least that an
operation must move: each input read and each output written once. The ceiling is a copy of as many bytes in all, or a
matrix product of 8192^3 before and after. It ends with status 1 if an operation differs from its reference.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moe_prefill import ops
from moe_prefill.bench.ceilings import Ceilings, Clock, Work
from moe_prefill.bench.report import report_head, save_report
from moe_prefill.core import ModelSpec
from moe_prefill.models import preset, spec_from_hf
from moe_prefill.ops.attention import ref_attention
from moe_prefill.ops.experts import ref_combine, ref_combine_rms_norm
from moe_prefill.ops.grouped import ref_grouped_mm
from moe_prefill.ops.merge import ref_merge_
from moe_prefill.ops.permute import ref_order_by_expert, ref_permute
from moe_prefill.ops.rms_norm import ref_add_rms_norm_, ref_rms_norm
from moe_prefill.ops.rope import ref_apply_rope
from moe_prefill.ops.router import ref_top_k_weights
from moe_prefill.ops.swiglu import ref_swiglu

MODELS = ("Qwen3-30B-A3B", "Qwen3-235B-A22B")
ROWS = (8192, 16384, 65536)
CHECKED_ROWS = 8192  # larger shapes run the same kernels
REQUEST_TOKENS = 4096
TOLERANCE, EXACT = {"rtol": 2e-2, "atol": 3e-2}, {"rtol": 0.0, "atol": 0.0}


@dataclass(frozen=True, slots=True)
class Case:
    """One operation: ours, the same from torch's own (where that is another thing), and what it must move or do.

    ``check`` gives what ours and the reference come to; None where another case has checked it.
    """

    name: str
    ours: Work
    torch: Work | None = None
    check: Callable[[], tuple[Any, Any]] | None = None
    num_bytes: int = 0
    flops: float = 0.0


class Layer:
    """Random activations and weights of one layer, and its cases."""

    def __init__(self, spec: ModelSpec, rows: int, device: torch.device) -> None:
        self.spec, self.rows, self.device = spec, rows, device
        self._generator = torch.Generator(device).manual_seed(rows)
        D, E, I = spec.hidden_size, spec.num_experts, spec.expert_size
        self.q_width, self.kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.x, self.delta = self.random(rows, D), self.random(rows, D)
        self.norm, self.head_norm = (1 + self.random(n, scale=0.1) for n in (D, spec.head_dim))
        self.router = self.random(E, D, scale=D**-0.5)
        self.weights, self.ids = ops.route(self.x, self.router, spec.top_k, normalize=True, float32_weights=False)
        self.order = ops.order_by_expert(self.ids, E)
        self.gate_up, self.down = self.random(E, 2 * I, D, scale=D**-0.5), self.random(E, D, I, scale=I**-0.5)

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return out.normal_(0, scale, generator=self._generator)

    def cases(self) -> Iterator[Case]:
        yield from self.norms()
        yield from self.routing()
        yield from self.rows_of_experts()
        yield from self.heads()
        yield from self.products()

    def norms(self) -> Iterator[Case]:
        x, delta, norm, eps = self.x, self.delta, self.norm, self.spec.norm_eps
        zeros, size = torch.zeros_like(x), _size(x)  # anything else would add up without bound

        def both(add: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
            residual = x.clone()
            return [add(residual, delta, norm, eps), residual]

        yield Case(
            "rms_norm",
            lambda: ops.rms_norm(x, norm, eps),
            lambda: F.rms_norm(x, norm.shape, norm, eps),
            lambda: (ops.rms_norm(x, norm, eps), ref_rms_norm(x, norm, eps)),
            2 * size,
        )
        yield Case(
            "add_rms_norm",
            lambda: ops.add_rms_norm_(x, zeros, norm, eps),
            lambda: F.rms_norm(x.add_(zeros), norm.shape, norm, eps),
            lambda: (both(ops.add_rms_norm_), both(ref_add_rms_norm_)),
            4 * size,
        )

    def routing(self) -> Iterator[Case]:
        E, K, how = self.spec.num_experts, self.spec.top_k, {"normalize": True, "dtype": torch.bfloat16}
        logits = F.linear(self.x, self.router)

        def native() -> Any:
            weights, ids = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), K)
            return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), ids

        size = _size(self.x, logits, self.router)
        yield Case("router_product", lambda: F.linear(self.x, self.router), num_bytes=size)
        yield Case(
            "top_k",
            lambda: ops.top_k_weights(logits, K, **how),
            native,
            lambda: (ops.top_k_weights(logits, K, **how), ref_top_k_weights(logits, K, **how)),
            _size(logits, self.weights, self.ids),
        )
        fields = ("ends_E", "token_of_row_R", "row_of_slot_TK")
        yield Case(
            "order_by_expert",
            lambda: ops.order_by_expert(self.ids, E),
            lambda: ref_order_by_expert(self.ids, E),
            lambda: tuple(
                [getattr(order, field).long() for field in fields]
                for order in (ops.order_by_expert(self.ids, E), ref_order_by_expert(self.ids, E))
            ),
            _size(self.ids, self.order.token_of_row_R, self.order.row_of_slot_TK),
        )

    def rows_of_experts(self) -> Iterator[Case]:
        x, order, slots, weights = self.x, self.order, self.order.row_of_slot_TK, self.weights
        rows_RD = ops.permute(x, order)
        yield Case(
            "permute",
            lambda: ops.permute(x, order),
            lambda: ref_permute(x, order),
            lambda: (ops.permute(x, order), ref_permute(x, order)),
            _size(x, slots, rows_RD),
        )
        yield Case(
            "combine",
            lambda: ops.combine(rows_RD, slots, weights, x),
            lambda: ref_combine(rows_RD, slots, weights, x),
            lambda: (ops.combine(rows_RD, slots, weights, x), ref_combine(rows_RD, slots, weights, x)),
            _size(x, x, slots, weights, rows_RD),
        )
        yield self.combine_and_norm(rows_RD)
        both_R2I = self.random(self.rows * self.spec.top_k, 2 * self.spec.expert_size)
        yield Case(
            "swiglu",
            lambda: ops.swiglu(both_R2I),
            lambda: ref_swiglu(both_R2I),
            lambda: (ops.swiglu(both_R2I), ref_swiglu(both_R2I)),
            _size(both_R2I) * 3 // 2,
        )

    def combine_and_norm(self, rows_RD: torch.Tensor) -> Case:
        """What ends a sparse layer, in one pass and in two."""
        x, norm, eps = self.x, self.norm, self.spec.norm_eps
        slots, weights, residual, normed = self.order.row_of_slot_TK, self.weights, self.x.clone(), torch.empty_like(x)

        def ours() -> list[torch.Tensor]:
            into = ops.NormInto(norm, eps, normed)
            return [ops.combine(rows_RD, slots, weights, x, residual, into), normed]

        def apart() -> list[torch.Tensor]:
            return list(ref_combine_rms_norm(rows_RD, slots, weights, x, norm, eps))

        return Case("combine_rms_norm", ours, apart, lambda: (ours(), apart()), _size(x, x, x, slots, weights, rows_RD))

    def heads(self) -> Iterator[Case]:
        spec, eps, norm = self.spec, self.spec.norm_eps, self.head_norm
        positions = torch.arange(self.rows, device=self.device) % REQUEST_TOKENS
        half = torch.arange(0, spec.head_dim, 2, device=self.device) / spec.head_dim
        cos, sin = ops.rope_tables(positions, 1.0 / 1e6**half, 1.0, torch.bfloat16)
        flat_q, flat_kv = self.random(self.rows, self.q_width), self.random(self.rows, 2 * self.kv_width)
        for name, flat in (("q_norm_rope", flat_q), ("k_norm_rope", flat_kv[:, : self.kv_width])):
            heads = flat.unflatten(1, (-1, spec.head_dim))  # type: ignore[no-untyped-call]
            yield Case(
                name,
                lambda heads=heads: ops.head_norm_rope(heads, norm, cos, sin, eps),
                lambda heads=heads: ref_apply_rope(F.rms_norm(heads, norm.shape, norm, eps), cos, sin),
                lambda heads=heads: (
                    ops.head_norm_rope(heads, norm, cos, sin, eps),
                    ref_apply_rope(ref_rms_norm(heads, norm, eps), cos, sin),
                ),
                2 * flat.numel() * 2 + _size(cos, sin),
            )

    def products(self) -> Iterator[Case]:
        spec, T, D, R = self.spec, self.rows, self.spec.hidden_size, self.rows * self.spec.top_k
        qkv = self.random(self.q_width + 2 * self.kv_width, D, scale=D**-0.5)
        yield Case("qkv", lambda: F.linear(self.x, qkv), flops=2 * T * qkv.numel())
        yield from self.output_projection()
        yield self.attention()
        yield self.merge()
        ends, rows_RD, hidden_RI = self.order.ends_E, ops.permute(self.x, self.order), self.random(R, spec.expert_size)
        for name, rows, weight in (("gate_up", rows_RD, self.gate_up), ("down", hidden_RI, self.down)):
            yield Case(
                name,
                lambda rows=rows, weight=weight: ops.grouped_mm(rows, weight, ends),
                check=lambda rows=rows, weight=weight: (
                    ops.grouped_mm(rows, weight, ends),
                    ref_grouped_mm(rows, weight, ends),
                ),
                flops=2 * rows.numel() * weight.shape[1],
            )
        yield Case(
            "experts",
            lambda: ops.experts(self.x, self.weights, self.ids, self.gate_up, self.down, self.x),
            flops=2 * R * 3 * D * spec.expert_size,
        )

    def output_projection(self) -> Iterator[Case]:
        """The projection, the residual and the norm behind it, in one op and in two."""
        attended, residual = self.random(self.rows, self.q_width), self.x.clone()
        out = self.random(self.spec.hidden_size, self.q_width, scale=self.q_width**-0.5)
        norm, eps, flops = self.norm, self.spec.norm_eps, 2 * self.rows * out.numel()
        small = out * 1e-6  # the residual is written again and again

        onto, wanted = self.x.clone(), self.x.clone()
        yield Case("o", lambda: F.linear(attended, out), flops=flops)
        yield Case(
            "linear, add_rms_norm",
            lambda: ops.add_rms_norm_(residual, F.linear(attended, small), norm, eps),
            lambda: F.rms_norm(residual + F.linear(attended, small), norm.shape, norm, eps),
            flops=flops,
        )
        yield Case(
            "linear_add_rms_norm",
            lambda: ops.linear_add_rms_norm_(attended, small, None, residual, norm, eps),
            check=lambda: (
                [ops.linear_add_rms_norm_(attended, out, None, onto, norm, eps), onto],
                [ref_add_rms_norm_(wanted, F.linear(attended, out), norm, eps), wanted],
            ),
            flops=flops,
        )

    def attention(self) -> Case:
        spec, length = self.spec, min(REQUEST_TOKENS, self.rows)
        q = self.random(self.rows, spec.num_heads, spec.head_dim)
        k, v = (self.random(self.rows, spec.num_kv_heads, spec.head_dim) for _ in range(2))
        ends = np.arange(0, self.rows + 1, length, dtype=np.int32)
        spans, short = ops.Spans.on(self.device, ends, ends), np.array([0, min(512, length)], np.int32)
        few, part = ops.Spans.on(self.device, short, short), slice(0, int(short[1]))
        how: dict[str, Any] = {"causal": True, "window": None, "scale": spec.head_dim**-0.5}
        return Case(
            "attention",
            lambda: ops.attention(q, k, v, spans, **how, need_lse=False),
            check=lambda: tuple(
                list(attention(q[part], k[part], v[part], few, **how)) for attention in (ops.attention, ref_attention)
            ),
            flops=4 * self.q_width * (length + 1) / 2 * self.rows,
        )

    def merge(self) -> Case:
        shape = (self.rows, self.spec.num_heads, self.spec.head_dim)
        out, other, lse, other_lse = (self.random(*shape[:n]) for n in (3, 3, 2, 2))
        lses = lse.float(), other_lse.float()

        def once(merge: Callable[..., None]) -> list[torch.Tensor]:
            into = [out.clone(), lses[0].clone()]
            merge(*into, other, lses[1])
            return into

        work = (lambda merge=merge: merge(out, lses[0], other, lses[1]) for merge in (ops.merge_, ref_merge_))
        return Case(
            "merge", *work, lambda: (once(ops.merge_), once(ref_merge_)), _size(out, out, other, *lses, lses[0])
        )


def _size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def difference(ours: Any, wanted: Any) -> str | None:
    """What torch's comparison says, within the tolerance of two bfloat16 roundings, integers exactly; None: equal."""
    if not isinstance(ours, torch.Tensor):
        return next(filter(None, itertools.starmap(difference, zip(ours, wanted, strict=True))), None)
    try:
        torch.testing.assert_close(ours, wanted, **(TOLERANCE if ours.is_floating_point() else EXACT))
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def measure(case: Case, clock: Clock, ceilings: Ceilings) -> dict[str, Any]:
    taken_s = clock.seconds(case.ours)
    cell: dict[str, Any] = {"operation": case.name, "us": 1e6 * taken_s}
    if case.torch is not None:
        cell["torch_us"] = 1e6 * clock.seconds(case.torch)
    if case.num_bytes:
        ceiling = ceilings.bytes_per_s(case.num_bytes)
        cell |= {"gb_per_s": case.num_bytes / taken_s / 1e9, "ceiling_gb_per_s": ceiling / 1e9}
        cell["share_of_ceiling"] = case.num_bytes / taken_s / ceiling
    else:
        cell |= {"tflop_per_s": case.flops / taken_s / 1e12, "ceiling_tflop_per_s": ceilings.flops / 1e12}
        cell["share_of_ceiling"] = case.flops / taken_s / ceilings.flops
    return cell


def line(cell: dict[str, Any]) -> str:
    kind = "gb_per_s" if "gb_per_s" in cell else "tflop_per_s"
    unit = "GB/s" if kind == "gb_per_s" else "TFLOP/s"
    beside = f"torch {cell['torch_us']:9.1f} us" if "torch_us" in cell else ""
    return (
        f"{cell['model']:16} {cell['rows']:6} {cell['operation']:26} {cell['us']:9.1f} us  {beside:18} "
        f"{cell[kind]:7.0f} {unit:7} of {cell['ceiling_' + kind]:6.0f}  {100 * cell['share_of_ceiling']:4.0f}%"
    )


def run(
    models: dict[str, ModelSpec], all_rows: Sequence[int], device: torch.device
) -> tuple[list[dict[str, Any]], int]:
    """All cells, and how many operations were wrong."""
    clock = Clock(device)
    ceilings, cells, wrong = Ceilings(clock), [], 0
    for (model, spec), rows in itertools.product(models.items(), all_rows):
        for case in Layer(spec, rows, device).cases():
            problem = None
            if case.check is not None and rows <= CHECKED_ROWS:
                problem = difference(*case.check())
                wrong += problem is not None
            cell = {"model": model, "rows": rows} | measure(case, clock, ceilings)
            cells.append(cell)
            print(line(cell) + (f"  WRONG: {problem}" if problem else ""), flush=True)
        ceilings.again()
    return cells, wrong


def small(spec: ModelSpec) -> ModelSpec:
    sizes = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return replace(spec, **sizes, num_experts=8, expert_size=48, top_k=2)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, help="rows of a chunk")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: spec_from_hf(preset(name)) for name in args.models}
    if device.type == "cpu":
        models = {"small": small(models[args.models[0]])}
    start = time.perf_counter()
    with torch.inference_mode():
        cells, wrong = run(models, args.rows or (ROWS if device.type == "cuda" else (256,)), device)
    print(f"{len(cells)} cells, {wrong} wrong, {time.perf_counter() - start:.0f} s")
    if args.out is not None:
        save_report(args.out, report_head(["python", *sys.argv]), cells)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
