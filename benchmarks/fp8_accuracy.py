"""What float8 costs in accuracy: answers of the demo model on real mails, and single layers at real shapes.

    python benchmarks/fp8_accuracy.py --out benchmarks/results/fp8_accuracy.json

Answers: workloads as in ``fidelity.py``, unshared. For every form of float8 the |difference of log-probability| to the
float32 and to the bfloat16 answers (median and 99th percentile, natural logarithm, over the vocabulary), how often the
best candidate is bfloat16's, and of ``spam`` how often it is the mail's true label. ``checkpoint`` forms read the demo
model from a float8 checkpoint with a scale for each block of 128 x 128, made here from the bfloat16 one.

Layers: ||error|| / ||output|| of projections and experts with N(0, 0.02) weights on N(0, 1) rows, against float32; with
fewer experts than the model has, which does not change an expert's error. Such weights have no outliers, so blocks and
rows differ less here than they may in a trained model. Nothing is timed: a CPU computes what a Hopper GPU computes.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fidelity import MAILS, MODEL, Answers, Workloads, agreement, describe, workloads
from safetensors.torch import load_file, save_file

from moe_prefill import Engine, ops
from moe_prefill.core import AtomicResult, Float32Array
from moe_prefill.models import preset
from moe_prefill.ops.experts import ref_experts

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [ops.BLOCK, ops.BLOCK],
}
LINEAR = tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How the model is stored and computed. ``blocks``: experts with block scales, as on a Hopper GPU with DeepGEMM."""

    name: str
    dtype: str = "bfloat16"
    quantization: str | None = None
    checkpoint: bool = False
    blocks: bool = False


FORMS = (
    Form(name="float32", dtype="float32"),
    Form(name="bf16"),
    Form(name="fp8, a scale a row", quantization="fp8"),
    Form(name="fp8, experts with block scales", quantization="fp8", blocks=True),
    Form(name="fp8 checkpoint, again with a scale a row", checkpoint=True),
    Form(name="fp8 checkpoint, experts as stored", checkpoint=True, blocks=True),
)


def block_checkpoint(directory: Path) -> None:
    """The demo model as a float8 checkpoint with block scales."""
    for file in MODEL.iterdir():
        if file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copy(file, directory)
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(MODEL.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.endswith(LINEAR):
                stored[name], stored[f"{name}_scale_inv"] = ops.quantize_blocks(tensor)
                stored[name] = stored[name].contiguous()
            else:
                stored[name] = tensor
    assert any(name.endswith("experts.0.up_proj.weight_scale_inv") for name in stored), "experts are stored one by one"
    save_file(stored, directory / "model.safetensors")
    config = json.loads((MODEL / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))


def answers(form: Form, checkpoint: Path, requests: Workloads, device: str, threads: int | None) -> Answers:
    """Log-probabilities of the asked ids, of every workload."""
    with ExitStack() as stack:
        if device == "cpu":
            refusal = None if form.blocks else "not asked for"
            stack.enter_context(mock.patch.object(ops, "blocks_refused", return_value=refusal))
        engine = stack.enter_context(
            Engine(
                checkpoint if form.checkpoint else MODEL,
                device=device,
                dtype=form.dtype,
                quantization=form.quantization,
                sharing="off",
                threads=threads,
            )
        )
        found: Answers = {}
        for name, work in requests.items():
            results = engine.scoring.score(work)
            assert all(isinstance(result, AtomicResult) for result in results)
            found[name] = [result.logprobs(asked) for result, asked in zip(results, work, strict=True)]
        return found


def compare(form: Form, got: Answers, found: Mapping[str, Answers], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row a workload and one for all together."""
    wide, plain = found["float32"], found["bf16"]
    for workload in [*got, "all"]:
        names = list(got) if workload == "all" else [workload]
        row: dict[str, Any] = {
            "form": form.name,
            "workload": workload,
            "answers": sum(len(np.concatenate(got[n])) for n in names),
        }
        for other, theirs in (("float32", wide), ("bf16", plain)):
            median, p99 = np.quantile(distances(theirs, got, names), (0.5, 0.99))
            row |= {f"median_to_{other}": float(median), f"p99_to_{other}": float(p99)}
        row["agreement_with_bf16"] = agreement(plain, got, [name for name in names if name != "text"])
        if workload == "spam":
            right = [
                ("spam", "ham")[answer.argmax()] == label for answer, label in zip(got["spam"], labels, strict=True)
            ]
            row["true_label"] = float(np.mean(right))
        yield row


def distances(one: Answers, other: Answers, names: Sequence[str]) -> Float32Array:
    return np.concatenate([np.abs(a - b) for name in names for a, b in zip(one[name], other[name], strict=True)])


def true_labels(count: int) -> list[str]:
    with MAILS.open(newline="", encoding="utf-8") as lines:
        return [row["label"] for row in csv.DictReader(lines)][:count]


def layer_errors(model: str, tokens: int, num_experts: int) -> Iterator[dict[str, Any]]:
    """Relative errors of one layer's parts; every token takes half of the experts."""
    config = preset(model)
    hidden, size = config["hidden_size"], config["moe_intermediate_size"]
    q_width, kv_width = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(shape).normal_(std=std, generator=generator)

    for part, (n, c) in {"qkv": (q_width + 2 * kv_width, hidden), "out": (hidden, q_width)}.items():
        x, weight = normal(tokens, c).bfloat16(), normal(n, c, std=0.02).bfloat16()
        want, again = x.float() @ weight.float().t(), ops.dequantize_blocks(*ops.quantize_blocks(weight))
        for form, got in {
            "bf16": ops.linear(x, weight),
            "fp8, a scale a row": ops.linear(x, ops.Float8Rows.of(weight)),
            "fp8 checkpoint, again with a scale a row": ops.linear(x, ops.Float8Rows.of(again)),
        }.items():
            yield {"model": model, "part": part, "form": form, "error": relative(got, want)}
    x = normal(tokens, hidden).bfloat16()
    gate_up = normal(num_experts, 2 * size, hidden, std=0.02).bfloat16()
    down = normal(num_experts, hidden, size, std=0.02).bfloat16()
    for form, error in expert_errors(x, gate_up, down):
        yield {"model": model, "part": "experts", "form": form, "error": error}


def expert_errors(
    x_TD: torch.Tensor, gate_up_E2ID: torch.Tensor, down_EDI: torch.Tensor
) -> Iterator[tuple[str, float]]:
    """The experts of one layer in every form."""
    E, D, I = down_EDI.shape
    ids = torch.rand(len(x_TD), E, generator=torch.Generator().manual_seed(1)).topk(max(1, E // 2)).indices
    weights, base = torch.full(ids.shape, 1.0 / ids.shape[1]).bfloat16(), torch.zeros_like(x_TD)
    want = ref_experts(x_TD.float(), weights, ids, gate_up_E2ID.float(), down_EDI.float())
    yield "bf16", relative(ops.experts(x_TD, weights, ids, gate_up_E2ID, down_EDI, base), want)
    blocks = [ops.quantize_blocks(matrix) for matrix in (gate_up_E2ID, down_EDI)]
    again = [ops.dequantize_blocks(*each) for each in blocks]
    for form, matrices in (
        ("fp8, a scale a row", (gate_up_E2ID, down_EDI)),
        ("fp8 checkpoint, again with a scale a row", again),
    ):
        rows = [ops.quantize_rows(matrix.flatten(0, 1)) for matrix in matrices]
        values = [row.view(matrix.shape) for (row, _), matrix in zip(rows, matrices, strict=True)]
        up_scale, down_scale = (scale.view(matrix.shape[:2]) for (_, scale), matrix in zip(rows, matrices, strict=True))
        yield form, relative(ops.experts(x_TD, weights, ids, *values, base, (up_scale, down_scale)), want)
    bank = torch.cat([values.flatten(1) for values, _ in blocks], dim=1)
    gates, downs = torch.zeros(E, 3, I // ops.BLOCK, D // ops.BLOCK), torch.zeros(E, 3, D // ops.BLOCK, I // ops.BLOCK)
    gates[:, :2].flatten(1, 2).copy_(blocks[0][1])
    downs[:, 2] = blocks[1][1]
    views = bank[:, : 2 * I * D].view(E, 2 * I, D), bank[:, 2 * I * D :].view(E, D, I)
    yield "fp8, block scales", relative(ops.experts(x_TD, weights, ids, *views, base, (gates, downs)), want)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def show(row: Mapping[str, Any]) -> None:
    print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mails", type=int, default=400)
    parser.add_argument("--long", type=int, default=60, help="mails of the workloads labels and text")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layer-tokens", type=int, default=64)
    parser.add_argument("--layer-experts", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made = describe(options.device)
    with Engine(MODEL, device="cpu", dtype="float32") as engine:
        requests = workloads(engine, options.mails, options.long)
    labels, found, rows = true_labels(options.mails), {}, []
    with tempfile.TemporaryDirectory() as directory:
        block_checkpoint(Path(directory))
        for form in FORMS:
            found[form.name] = answers(form, Path(directory), requests, options.device, options.threads)
    for form in FORMS:
        rows += compare(form, found[form.name], found, labels)
    layers = [
        row
        for model in ("Qwen3-30B-A3B", "Qwen3-235B-A22B")
        for row in layer_errors(model, options.layer_tokens, options.layer_experts)
    ]
    for row in (*rows, *layers):
        show(row)
    if options.out:
        report = {**made, "rows": rows, "layers": layers}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
