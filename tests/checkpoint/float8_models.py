"""Tiny models as float8 checkpoints with block scales, and what their matrices stand for, worked out block by block."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

BLOCK = 128
SIZES = {
    "vocab_size": 50,
    "hidden_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 48,  # queries 288 rows, keys and values 96: no border of a fused matrix meets one of blocks
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 208,
    "intermediate_size": 144,
    "mlp_only_layers": [1],
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}
KEPT_WIDE = ("embed_tokens", "lm_head", "norm", "mlp.gate.")


def quantise(matrix: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float8 values, the scales of their blocks, and the wide matrix that both stand for; loops over blocks."""
    rows, columns = matrix.shape
    scale = torch.empty(math.ceil(rows / BLOCK), math.ceil(columns / BLOCK), dtype=scale_dtype)
    values, wide = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = matrix[part].abs().max() / 448
            values[part] = (matrix[part] / scale[i, j].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            wide[part] = values[part].float() * scale[i, j].float()
    return values, scale, wide


def save(
    directory: Path,
    *,
    fused: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
    shards: bool = False,
    **sizes: object,
) -> tuple[Qwen3MoeForCausalLM, dict[str, torch.Tensor]]:
    """A float8 checkpoint, the float32 model that it stands for, and its stored tensors.

    ``fused``: how experts are named: None (one by one), ``apart`` (gate and up with grids of their own) or ``joint``
    (one grid over both).
    """
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(SIZES | sizes))).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Blocks of very different sizes, so that a scale in the wrong place shows.
            parameter.normal_(std=0.02)
            if parameter.ndim == 1:
                parameter.add_(1.0)
            elif "embed" not in name:
                parameter.mul_(torch.logspace(-0.5, 0.5, parameter.shape[-1]))
    model.save_pretrained(directory, save_original_format=fused is None)
    tensors = load_file(directory / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    wide: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or any(word in name for word in KEPT_WIDE):
            stored[name] = wide[name] = tensor
        else:
            stored[name], stored[f"{name}_scale_inv"], wide[name] = _quantised(name, tensor, fused, scale_dtype)
    _write(directory, stored, shards)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    reference = directory / "reference"
    reference.mkdir()
    save_file(wide, reference / "model.safetensors", metadata={"format": "pt"})
    (reference / "config.json").write_text(json.dumps(config))
    return Qwen3MoeForCausalLM.from_pretrained(reference, dtype=torch.float32).eval(), stored


def _quantised(
    name: str, tensor: torch.Tensor, fused: str | None, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if tensor.ndim == 2:
        return quantise(tensor, scale_dtype)
    parts = 2 if fused == "apart" and "gate_up" in name else 1
    experts = [[quantise(part, scale_dtype) for part in matrix.chunk(parts)] for matrix in tensor]
    values, scales, wide = (torch.stack([torch.cat([p[k] for p in e]) for e in experts]) for k in range(3))
    return values, scales, wide


def _write(directory: Path, stored: dict[str, torch.Tensor], shards: bool) -> None:
    path = directory / "model.safetensors"
    if not shards:
        save_file(stored, path)
        return
    path.unlink()
    scales = {name: tensor for name, tensor in stored.items() if name.endswith("_scale_inv")}
    files = {"model-1.safetensors": {n: t for n, t in stored.items() if n not in scales}, "model-2.safetensors": scales}
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
