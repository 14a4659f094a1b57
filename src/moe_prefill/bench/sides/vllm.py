"""vLLM, prefill only: one token is generated and its log-probability given.

Prefix caching is on for cells that share and off for the others, so there may be two engines, one after the other, and
one more for every token budget of a step that is tried (setting ``batched_tokens``); the best counts. Setting ``llm``
goes to vLLM as it is, for instance how several GPUs are used; ``tokens_per_call`` are those of one timed call, which
several GPUs need more of. DeepGEMM's kernels are compiled by the warm-up, not before it.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...checkpoint import resolve_directory
from ..cells import Cell
from ..job import Job, raw_config
from ..timing import Timing
from .files import run, tell
from .refill import refill

BATCHED_TOKENS = (32768,)
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CACHE_ROOT": "/tmp/vllm_cache",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # ``refill`` goes to the engine's process on this machine
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    # Nothing multicasts in the switch, as on our side.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
_TOKENS_PER_CALL = 262144  # of one timed call: several steps of the engine


def measure(job: Job) -> list[dict[str, Any]]:
    """The best rate of every cell over the settings tried, in the job's order."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    best: dict[int, dict[str, Any]] = {}
    cells, engine = job.parsed, None
    with TemporaryDirectory(prefix="moe-prefill-vllm-") as folder:
        vocab = _write_config(job, Path(folder), max(cell.tokens for cell in cells))
        for caching, budget in itertools.product((False, True), job.settings.get("batched_tokens", BATCHED_TOKENS)):
            chosen = [index for index, cell in enumerate(cells) if cell.shares == caching]
            if not chosen:
                continue
            if engine is not None:  # the last one ends with this process: its figures are handed in before
                _close(engine)
                engine = None
            engine, settings = _engine(job, folder, budget, caching, max(cells[i].tokens for i in chosen))
            for index in chosen:
                found = _cell(engine, cells[index], job, vocab) | {"peer_settings": settings}
                tell(found)
                kept = best.get(index)
                if kept is None or found["peer_tokens_per_s"] > kept["peer_tokens_per_s"]:
                    best[index] = found
    return [best[index] for index in range(len(cells))]


def _write_config(job: Job, folder: Path, longest: int) -> int:
    """A config.json for vLLM; the size of the vocabulary. A checkpoint's directory is linked beside it."""
    raw = raw_config(job.config)
    if job.config.load_format != "dummy":
        for file in resolve_directory(job.config.model, revision=job.config.revision).iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file.resolve())
    raw["max_position_embeddings"] = max(raw["max_position_embeddings"], longest + 16)
    raw["num_hidden_layers"] = job.config.num_layers or raw["num_hidden_layers"]
    if job.precision == "fp8" and "quantization_config" not in raw:
        raw["quantization_config"] = _block_scales(raw["num_hidden_layers"])
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return int(raw["vocab_size"])


def _block_scales(num_layers: int) -> dict[str, Any]:
    """As published FP8 checkpoints of Qwen3 say it: 128 x 128 blocks, dynamic activation scales."""
    wide = ("input_layernorm", "post_attention_layernorm", "mlp.gate")
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "lm_head",
            *(f"model.layers.{index}.{name}" for index in range(num_layers) for name in wide),
        ],
    }


def _engine(job: Job, folder: str, budget: int, caching: bool, longest: int) -> tuple[Any, str]:
    """vLLM's engine and its settings in words."""
    import torch
    import vllm  # type: ignore[import-not-found,unused-ignore]  # installed by who compares

    dummy = job.config.load_format == "dummy"
    more = job.settings.get("llm", {})
    arguments: dict[str, Any] = {
        "model": folder,
        "load_format": "dummy" if dummy else "auto",
        "skip_tokenizer_init": True,
        "dtype": "float32" if job.precision == "fp32" else "bfloat16",
        "max_model_len": longest + 16,
        "enable_prefix_caching": caching,
        "max_num_batched_tokens": budget,
        "max_num_seqs": 512,
        "disable_log_stats": True,
        "seed": job.config.seed,
        "tensor_parallel_size": job.config.gpus or 1,
        **({"gpu_memory_utilization": 0.92} if torch.cuda.is_available() else {}),
        **({"compilation_config": {"cudagraph_mode": "NONE"}} if torch.cuda.is_available() else {}),
        **more,
    }
    engine = vllm.LLM(**arguments)
    if dummy:
        engine.apply_model(refill)
    words = [f"max_tokens=1, {budget} tokens a step, prefix caching {'on' if caching else 'off'}"]
    words += ["dummy weights N(0, 0.02)"] if dummy else []
    words += ["FP8 128x128 blocks"] if job.precision == "fp8" else []
    return engine, ", ".join([*words, *(f"{key}={value}" for key, value in more.items())])


def _cell(engine: Any, cell: Cell, job: Job, vocab: int) -> dict[str, Any]:
    import vllm

    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, detokenize=False, ignore_eos=True)
    tokens = job.settings.get("tokens_per_call", _TOKENS_PER_CALL)
    families = max(1, round(tokens / (cell.siblings * cell.tokens)))
    prompts = [{"prompt_token_ids": row.tolist()} for row in cell.rows(families, vocab)]
    timing = Timing(job.seconds)
    while not timing.is_done:
        timing.add(_seconds(engine, prompts, sampling, cell.shares))
    return {
        "peer": "vllm",
        "peer_version": vllm.__version__,
        "peer_tokens_per_s": len(prompts) * cell.tokens / timing.median,
    }


def _seconds(engine: Any, prompts: Sequence[Any], sampling: Any, shares: bool) -> float:
    if shares:
        engine.reset_prefix_cache()  # nothing stays from the call before
    start = time.perf_counter()
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    took = time.perf_counter() - start
    assert len(outputs) == len(prompts), (len(outputs), len(prompts))
    return took


def _close(engine: Any) -> None:
    """End the engine's process, so that the next one finds the memory free."""
    import torch

    engine.llm_engine.engine_core.shutdown()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


if __name__ == "__main__":
    run(measure)
