"""Float8 products and quantisation on one Hopper GPU: each checked against a plain reference, then timed.

    python benchmarks/fp8_ops.py --out benchmarks/results/fp8_ops.json

Prints for every operation at the shapes of Qwen3-30B-A3B and Qwen3-235B-A22B its relative error, its milliseconds and
its TFLOP/s (of matrix work asked for; alignment rows do not count) or GB/s (read and written). What a machine lacks
prints its reason and the rest goes on; an error beyond its bound ends the script with status 1. ``--tokens 64 --device
cpu --small`` tries it out anywhere.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moe_prefill import ops
from moe_prefill.calibrate.timing import seconds
from moe_prefill.ops import block_experts as blocks
from moe_prefill.ops.block_linear import KERNELS as BLOCK_KERNELS
from moe_prefill.ops.block_linear import BlockKernel
from moe_prefill.ops.quantize import quantize_groups, swiglu_quantize_groups

BOUND = 0.02  # of ||difference|| / ||reference||, where both sides see the same float8 numbers
QUANTISED_BOUND = 0.08  # where one side sees the numbers before their quantisation
Cell = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shapes:
    name: str
    hidden: int
    q_width: int
    kv_width: int
    experts: int
    size: int
    top_k: int = 8


REAL = (Shapes("Qwen3-30B-A3B", 2048, 4096, 512, 128, 768), Shapes("Qwen3-235B-A22B", 4096, 8192, 512, 128, 1536))
SMALL = (Shapes("small", 256, 256, 128, 6, 128, 2),)


class Bench:
    """Collects cells; ``run`` times one operation, or says why it cannot be run here."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cells: list[Cell] = []
        self.wrong: list[str] = []

    def run(
        self,
        name: str,
        work: Callable[[], torch.Tensor],
        *,
        error: Callable[[torch.Tensor], float] | None = None,
        bound: float = BOUND,
        flops: float = 0.0,
        num_bytes: float = 0.0,
    ) -> None:
        cell: Cell = {"op": name}
        try:
            found = work()
            cell["error"] = None if error is None else error(found)
            del found
            time_s = seconds(work, self.device, 0.3)
        except (RuntimeError, ValueError, ImportError, NotImplementedError) as problem:
            cell["skipped"] = str(problem).strip().splitlines()[0][:200]
            self._keep(cell)
            return
        cell["ms"] = 1e3 * time_s
        if flops:
            cell["tflops"] = flops / time_s / 1e12
        if num_bytes:
            cell["gb_per_s"] = num_bytes / time_s / 1e9
        if cell["error"] is not None and not cell["error"] <= bound:
            self.wrong.append(f"{name}: error {cell['error']:.3g}, at most {bound} expected")
        self._keep(cell)

    def _keep(self, cell: Cell) -> None:
        self.cells.append(cell)
        parts = [f"{key} {value:.4g}" for key, value in cell.items() if isinstance(value, float)]
        print(f"{cell['op']:64} {'  '.join(parts)}{cell.get('skipped', '')}", flush=True)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def normal(*shape: int, device: torch.device, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16) * std


def block_scaled_mm(
    kernel: BlockKernel, x: tuple[torch.Tensor, torch.Tensor], weight: ops.Float8Blocks
) -> torch.Tensor:
    """The product of 1x128 rows and 128x128 blocks by one of the kernels for it."""
    out = x[0].new_empty(len(x[0]), len(weight), dtype=torch.bfloat16)
    kernel.run(*x, weight, out)
    return out


def linears(bench: Bench, shapes: Shapes, tokens: int) -> None:
    """qkv and output projection."""
    matrices = {
        "qkv": (shapes.q_width + 2 * shapes.kv_width, shapes.hidden),
        "out": (shapes.hidden, shapes.q_width),
    }
    for part, (n, c) in matrices.items():
        linear(bench, f"{shapes.name} {part}", tokens, n, c)


def linear(bench: Bench, name: str, tokens: int, n: int, c: int) -> None:
    """One projection in bfloat16, row-wise float8 and block-wise float8."""
    x, weight = normal(tokens, c, device=bench.device), normal(n, c, device=bench.device, std=0.02)
    label, flops = f"{name} {tokens} x {n} x {c}:", 2.0 * tokens * n * c
    some = slice(0, 256)
    exact = x[some].float() @ weight.float().t()
    bench.run(f"{label} bf16", lambda: F.linear(x, weight), error=lambda y: distance(y[some], exact), flops=flops)

    rows, matrix = ops.Float8Rows.of(x), ops.Float8Rows.of(weight)
    want = rows[some].wide(torch.float32) @ matrix.wide(torch.float32).t()
    bench.run(
        f"{label} fp8 rows", lambda: ops.linear(rows, matrix), error=lambda y: distance(y[some], want), flops=flops
    )
    bench.run(
        f"{label} fp8 rows, with quantisation",
        lambda: ops.linear(x, matrix),
        error=lambda y: distance(y[some], exact),
        bound=QUANTISED_BOUND,
        flops=flops,
    )
    grouped, blocked = quantize_groups(x), ops.Float8Blocks.of(weight)
    wide = grouped[0][some].float() * grouped[1][:, some].t().repeat_interleave(ops.BLOCK, 1)
    for kernel in BLOCK_KERNELS:
        bench.run(
            f"{label} fp8 blocks, {kernel.name}",
            lambda kernel=kernel: block_scaled_mm(kernel, grouped, blocked),
            error=lambda y: distance(y[some], wide @ blocked.wide(torch.float32).t()),
            flops=flops,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """The same matrices three times: bfloat16 without gaps, float8 with a scale a row, float8 with block scales."""

    plain: torch.Tensor
    rows: torch.Tensor
    row_scales: tuple[torch.Tensor, torch.Tensor]
    blocks: torch.Tensor
    block_scales: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, shapes: Shapes, device: torch.device) -> Bank:
        E, I, D = shapes.experts, shapes.size, shapes.hidden
        plain = torch.empty(E, 3 * I * D, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        rows, grid = (torch.empty(E, 3 * I * D, dtype=ops.FLOAT8, device=device) for _ in range(2))
        up, down = torch.empty(E, 2 * I, device=device), torch.empty(E, D, device=device)
        gates = torch.zeros(E, 3, I // ops.BLOCK, D // ops.BLOCK, device=device)
        downs = torch.zeros(E, 3, D // ops.BLOCK, I // ops.BLOCK, device=device)
        for expert in range(E):
            a, b = views(plain, shapes, expert)
            ra, rb = views(rows, shapes, expert)
            ga, gb = views(grid, shapes, expert)
            for source, target, scale in ((a, ra, up[expert]), (b, rb, down[expert])):
                values, found = ops.quantize_rows(source)
                target.copy_(values)
                scale.copy_(found)
            for source, target, scale in ((a, ga, gates[expert, :2].flatten(0, 1)), (b, gb, downs[expert, 2])):
                values, found = ops.quantize_blocks(source)
                target.copy_(values)
                scale.copy_(found)
        return cls(plain, rows, (up, down), grid, (gates, downs))


def views(bank: torch.Tensor, shapes: Shapes, expert: int | slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [E, 2I, D] and down [E, D, I] of a bank, or of one expert."""
    E, I, D = shapes.experts, shapes.size, shapes.hidden
    gate_up, down = bank[:, : 2 * I * D].view(E, 2 * I, D), bank[:, 2 * I * D :].view(E, D, I)
    return gate_up[expert], down[expert]


def routed(shapes: Shapes, tokens: int, device: torch.device) -> torch.Tensor:
    """Ids [T, K]: experts of uneven popularity."""
    popular = torch.linspace(0.5, 1.5, shapes.experts, device=device)
    return (torch.rand(tokens, shapes.experts, device=device) * popular).topk(shapes.top_k).indices


def grouped(bench: Bench, shapes: Shapes, bank: Bank, tokens: int) -> None:
    """One product of every kind over sorted rows."""
    device, E, I, D = bench.device, shapes.experts, shapes.size, shapes.hidden
    ids, rows = routed(shapes, tokens, device), tokens * shapes.top_k
    experts = torch.arange(E, device=device)
    ends = torch.searchsorted(ids.flatten().sort().values, experts, right=True, out_int32=True)
    aligned = blocks.aligned_rows(ids, E)
    for part, index, width, out in (("gate+up", 0, D, 2 * I), ("down", 1, I, D)):
        label, flops = f"{shapes.name} {part} {tokens} tokens:", 2.0 * rows * width * out
        plain, matrix = views(bank.plain, shapes)[index], views(bank.rows, shapes)[index]
        row_products(bench, label, plain, matrix, bank.row_scales[index], ends, flops)
        block_products(bench, label, shapes, bank, aligned, flops, index)


def row_products(
    bench: Bench,
    label: str,
    plain_ENC: torch.Tensor,
    matrix_ENC: torch.Tensor,
    scale_EN: torch.Tensor,
    ends: torch.Tensor,
    flops: float,
) -> None:
    """The products of one projection in bfloat16 and in float8 with a scale a row."""
    end, rows = int(ends[0]), int(ends[-1])
    x = normal(rows, plain_ENC.shape[2], device=bench.device)
    bench.run(f"{label} bf16", lambda: ops.grouped_mm(x, plain_ENC, ends), flops=flops)
    values, scale = ops.quantize_rows(x)

    def error(y: torch.Tensor) -> float:
        wide = ops.dequantize(values[:end], scale[:end], torch.float32)
        return distance(y[:end], wide @ ops.dequantize(matrix_ENC[0], scale_EN[0], torch.float32).t())

    bench.run(
        f"{label} fp8 rows",
        lambda: ops.scaled_grouped_mm(values, scale, matrix_ENC, scale_EN, ends, torch.bfloat16),
        error=error,
        flops=flops,
    )


def block_products(
    bench: Bench, label: str, shapes: Shapes, bank: Bank, rows: blocks.AlignedRows, flops: float, index: int
) -> None:
    """The products of one projection as the experts call them: gate and up apart, or down."""
    E, I, D = shapes.experts, shapes.size, shapes.hidden
    n, c = ((I, D), (D, I))[index]
    matrices, scale = bank.blocks.view(3 * E, n, c), bank.block_scales[index].flatten(0, 1)
    values, scale_GM = quantize_groups(normal(len(rows.expert), c, device=bench.device))
    indices = [
        torch.where(rows.expert < 0, -1, 3 * rows.expert + which).to(torch.int32) for which in ((0, 1), (2,))[index]
    ]

    def work() -> torch.Tensor:
        each = [
            blocks.block_grouped_mm(values, scale_GM, matrices, scale, matrix, torch.bfloat16) for matrix in indices
        ]
        return each[0]

    def error(y: torch.Tensor) -> float:
        some = slice(0, 128)  # of one expert, rows in between included
        want = blocks.ref_block_grouped_mm(
            values[some], scale_GM[:, some], matrices, scale, indices[0][some], torch.float32
        )
        return distance(y[some], want)

    share = len(rows.expert) / rows.order.row_of_slot_TK.numel()
    bench.run(f"{label} fp8 blocks (DeepGEMM, x{share:.3f} rows)", work, error=error, flops=flops)


def whole(bench: Bench, shapes: Shapes, bank: Bank, tokens: int) -> None:
    """All of a layer's experts, from routing to the residual, in the three precisions."""
    device = bench.device
    x, ids = normal(tokens, shapes.hidden, device=device), routed(shapes, tokens, device)
    weights = torch.rand(tokens, shapes.top_k, device=device).to(torch.bfloat16)
    base = torch.zeros_like(x)
    flops = 6.0 * ids.numel() * shapes.size * shapes.hidden
    plain = ops.experts(x, weights, ids, *views(bank.plain, shapes), base)
    kinds = {
        "bf16": (bank.plain, None),
        "fp8 rows": (bank.rows, bank.row_scales),
        "fp8 blocks": (bank.blocks, bank.block_scales),
    }
    for kind, (matrices, scales) in kinds.items():
        bench.run(
            f"{shapes.name} all experts {tokens} tokens: {kind}",
            lambda matrices=matrices, scales=scales: ops.experts(
                x, weights, ids, *views(matrices, shapes), base, scales
            ),
            error=lambda y: distance(y, plain),
            bound=QUANTISED_BOUND,
            flops=flops,
        )


def quantisation(bench: Bench, shapes: Shapes, tokens: int) -> None:
    """Bytes read and written by each of the passes."""
    device, I = bench.device, shapes.size
    x = normal(tokens, shapes.hidden, device=device)
    both = normal(tokens * shapes.top_k, 2 * I, device=device)
    want_x, want_h = x.float(), ops.swiglu(both).float()

    def wide(result: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        values, scale = result
        if scale.ndim == 2:
            return values.float() * scale.t().repeat_interleave(ops.BLOCK, 1)
        return values.float() * scale[:, None]

    passes: dict[str, tuple[Callable[[], tuple[torch.Tensor, torch.Tensor]], torch.Tensor, int]] = {
        "quantise, scale a row": (lambda: ops.quantize_rows(x), want_x, x.numel() * 3),
        "quantise, scale for 128 channels": (lambda: quantize_groups(x), want_x, x.numel() * 3),
        "SwiGLU and quantise, a row": (lambda: ops.swiglu_quantize(both), want_h, both.numel() * 5 // 2),
        "SwiGLU and quantise, 128 channels": (
            lambda: swiglu_quantize_groups(both[:, :I], both[:, I:]),
            want_h,
            both.numel() * 5 // 2,
        ),
    }
    for name, (work, want, num_bytes) in passes.items():
        error = distance(wide(work()), want)
        bench.run(
            f"{shapes.name} {tokens} tokens: {name}",
            lambda work=work: work()[0],
            error=lambda _, error=error: error,
            bound=QUANTISED_BOUND,
            num_bytes=num_bytes,
        )


def measure(bench: Bench, shapes: Shapes, tokens: Sequence[int]) -> None:
    """Everything at the shapes of one model."""
    reason = ops.blocks_refused(shapes.hidden, shapes.size, torch.bfloat16, bench.device)
    print(f"{shapes.name}: block-scaled experts {'as they are' if reason is None else f'are not run: {reason}'}")
    for count in tokens:
        quantisation(bench, shapes, count)
        linears(bench, shapes, count)
    bank = Bank.random(shapes, bench.device)
    for count in tokens:
        grouped(bench, shapes, bank, count)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        whole(bench, shapes, bank, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(torch.device(options.device))
    for shapes in SMALL if options.small else REAL:
        measure(bench, shapes, options.tokens)
    report = {
        "gpu": torch.cuda.get_device_name() if bench.device.type == "cuda" else "none",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "git": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip(),
        "torch": torch.__version__,
        "cells": bench.cells,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if bench.wrong:
        sys.exit("\n".join(bench.wrong))


if __name__ == "__main__":
    main()
