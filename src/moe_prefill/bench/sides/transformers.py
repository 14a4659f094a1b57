"""Hugging Face transformers on views of the same dummy weights, or on the same checkpoint.

Equal lengths, so nothing is padded; no cache; the last logit only. The experts implementation and the tokens of a
batch are chosen by a first timing of each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from ...checkpoint import resolve_directory
from ...engine.build import pick_device, pick_dtype
from ...engine.load import load_weights, open_model
from ...errors import UsageError
from ..cells import CANDIDATES, CHECKED_REQUESTS, CHECKED_TOKENS, Cell
from ..job import Job, long_enough, raw_config
from ..timing import Timing
from .files import run, tell

EXPERTS = {"cuda": ("grouped_mm",), "cpu": ("eager", "batched_mm", "grouped_mm")}
BATCH_TOKENS = {"cuda": (16384, 32768, 65536), "cpu": (512, 2048, 8192)}


def measure(job: Job) -> list[dict[str, Any]]:
    """Every cell's rate, by the keys of result files."""
    if job.precision == "fp8":
        raise UsageError("transformers is compared in BF16 and float32 only; leave --quantization out")
    quiet: Any = transformers.utils.logging.set_verbosity_error
    quiet()
    with long_enough(job) as fitting:
        model = twin(fitting)
    found = []
    for cell in job.parsed:
        found.append(_cell(model, cell, job))
        tell(found[-1])
    return found


def twin(job: Job) -> Any:
    """transformers' model of the same shapes; with dummy weights its parameters are views of ours."""
    config, device = job.config, pick_device(job.config.device)
    library: Any = transformers.AutoModelForCausalLM
    if config.load_format != "dummy":
        directory = resolve_directory(config.model, revision=config.revision)
        published = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
        return library.from_pretrained(directory, dtype=published).to(device).eval()
    theirs = transformers.AutoConfig.for_model(**raw_config(config))
    theirs._attn_implementation = "sdpa"
    dtype = pick_dtype(config.dtype, open_model(config.model, "dummy")[0], device)
    spec, weights, banks = load_weights(
        config.model,
        device=device,
        dtype=dtype,
        load_format="dummy",
        seed=config.seed,
        skew=config.dummy_skew or 1.0,
        num_layers=config.num_layers,
    )
    theirs.num_hidden_layers = spec.num_layers
    with torch.device("meta"):
        model = library.from_config(theirs, dtype=dtype)
    model.load_state_dict(qwen3_state(spec, weights, banks), assign=True, strict=True)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(theirs)  # its tables are not among the parameters
    return model.eval()


def qwen3_state(spec: Any, weights: Any, banks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The state of a Qwen3-MoE model as views of our tensors. UsageError for other families."""
    if spec.family != "qwen3_moe":
        raise UsageError(f"dummy weights of {spec.family} have no counterpart in transformers here; give a checkpoint")
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    state = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.final_norm}
    state["lm_head.weight"] = weights.lm_head
    for index, (layer, bank) in enumerate(zip(weights.layers, banks, strict=True)):
        q, k, v = layer.attention.qkv.split([q_width, kv_width, kv_width])
        mine = {
            "input_layernorm": layer.attention.norm,
            "post_attention_layernorm": layer.ffn_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.attention.out,
            "self_attn.q_norm": layer.attention.q_norm,
            "self_attn.k_norm": layer.attention.k_norm,
            "mlp.gate": layer.ffn.router,
        }
        state |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in mine.items()}
        state[f"model.layers.{index}.mlp.experts.gate_up_proj"] = bank.gate_up
        state[f"model.layers.{index}.mlp.experts.down_proj"] = bank.down
    return state


def _cell(model: Any, cell: Cell, job: Job) -> dict[str, Any]:
    device = model.lm_head.weight.device.type
    vocab = model.config.vocab_size
    sizes = sorted({max(1, tokens // cell.tokens) for tokens in BATCH_TOKENS[device]})
    rows = cell.rows(-(-sizes[-1] // cell.siblings), vocab)
    tried = {}
    for experts in EXPERTS[device]:
        model.set_experts_implementation(experts)
        for batch in sizes:
            try:
                tried[(experts, batch)] = min(_seconds(model, rows[:batch]) for _ in range(2)) / batch
            except torch.OutOfMemoryError:  # of a large batch, on a small GPU; a smaller one was timed
                if not tried:
                    raise
    experts, batch = min(tried, key=lambda setting: tried[setting])
    model.set_experts_implementation(experts)
    timing = Timing(job.seconds)
    while not timing.is_done:
        timing.add(_seconds(model, rows[:batch]))
    return {
        "peer": "transformers",
        "peer_version": transformers.__version__,
        "peer_settings": f"experts {experts}, sdpa, batches of {batch} equal lengths, logits_to_keep=1, no cache",
        "peer_tokens_per_s": batch * cell.tokens / timing.median,
        **_checked(model, rows[: min(batch, CHECKED_REQUESTS, CHECKED_TOKENS // cell.tokens)]),
    }


def _checked(model: Any, rows: Sequence[np.ndarray]) -> dict[str, Any]:
    """Logits that ours are held against."""
    return {"peer_logits": _logits(model, rows).tolist()} if len(rows) else {}


@torch.inference_mode()
def _logits(model: Any, rows: Sequence[np.ndarray]) -> np.ndarray:
    """The candidates' logits after the last token of each row, float32 [rows, candidates]."""
    ids = torch.from_numpy(np.stack(rows)).long().to(model.lm_head.weight.device)
    asked = [token % model.config.vocab_size for token in CANDIDATES]
    found: np.ndarray = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1, asked].float().cpu().numpy()
    return found


def _seconds(model: Any, rows: Sequence[np.ndarray]) -> float:
    start = time.perf_counter()
    _logits(model, rows)
    return time.perf_counter() - start


if __name__ == "__main__":
    run(measure)
