"""The test reference: small random transformers models of the four families, and their weights in our slots.

The conversion here is independent of the checkpoint room, which has tests of its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from moe_prefill.core import AtomicRequest, ModelSpec
from moe_prefill.engine.local import LocalEngine
from moe_prefill.experts import BankSource, ResidentBanks
from moe_prefill.memory import plan_memory
from moe_prefill.models import spec_from_hf
from moe_prefill.models.weights import ExpertBank, ModelWeights, weights_from_slots

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
VOCAB = 97


def random_config(family: str, seed: int) -> transformers.PreTrainedConfig:
    """A small adversarial configuration: odd sizes, few or many experts, windows, rope scalings, biases, dense
    layers.
    """
    r = random.Random(f"{family}-{seed}")
    kv_heads = r.choice([1, 2, 3])
    heads = kv_heads * r.choice([1, 2, 4])
    head_dim = r.choice([8, 16, 24])
    hidden = r.choice([32, 40, 64]) if family in ("qwen3_moe", "mixtral") else heads * head_dim
    experts = r.choice([4, 7, 12])
    common = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": r.choice([1, 2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_experts_per_tok": r.randint(1, min(4, experts)),
        "max_position_embeddings": 256,
        "initializer_range": r.choice([0.1, 0.25]),
        "tie_word_embeddings": r.random() < 0.3,
        "rms_norm_eps": r.choice([1e-6, 1e-5]),
        "rope_parameters": random_rope(r),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    if family == "mixtral":
        return _random_mixtral(r, common, head_dim, experts)
    if family == "olmoe":
        return _random_olmoe(r, common, experts)
    return _random_qwen(r, family, common, head_dim, experts)


def _random_mixtral(r: random.Random, common: dict, head_dim: int, experts: int) -> transformers.PreTrainedConfig:
    # transformers itself fails on an absent head_dim with a scaled rope
    is_plain = common["rope_parameters"]["rope_type"] == "default"
    return transformers.MixtralConfig(
        **common,
        head_dim=None if is_plain and common["hidden_size"] % (2 * common["num_attention_heads"]) == 0 else head_dim,
        intermediate_size=r.choice([16, 24]),
        num_local_experts=experts,
        sliding_window=r.choice([None, 3, 9, 40]),
    )


def _random_olmoe(r: random.Random, common: dict, experts: int) -> transformers.PreTrainedConfig:
    return transformers.OlmoeConfig(
        **common,
        intermediate_size=r.choice([16, 24]),
        num_experts=experts,
        norm_topk_prob=r.random() < 0.5,
        clip_qkv=r.choice([None, 0.5, 2.0]),
        attention_bias=r.random() < 0.5,
    )


def _random_qwen(
    r: random.Random, family: str, common: dict, head_dim: int, experts: int
) -> transformers.PreTrainedConfig:
    qwen = {
        "moe_intermediate_size": r.choice([16, 20]),
        "intermediate_size": r.choice([24, 48]),
        "num_experts": experts,
        "norm_topk_prob": r.random() < 0.5,
        "decoder_sparse_step": r.choice([1, 1, 2]),
        "mlp_only_layers": [0] if r.random() < 0.3 else [],
        "use_sliding_window": r.random() < 0.6,
        "sliding_window": r.choice([2, 5, 17, 40]),
    }
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**common, **qwen, head_dim=head_dim, attention_bias=r.random() < 0.5)
    return transformers.Qwen2MoeConfig(
        **common,
        **qwen,
        shared_expert_intermediate_size=r.choice([16, 40]),
        qkv_bias=r.random() < 0.7,
        max_window_layers=r.randint(0, common["num_hidden_layers"]),
    )


def random_rope(r: random.Random) -> dict:
    theta = r.choice([1e4, 1e6])
    kind = r.choice(["default", "default", "linear", "dynamic", "yarn", "llama3"])
    extra = {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }[kind]
    return {"rope_type": kind, "rope_theta": theta, **extra}


def random_model(family: str, seed: int, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(random_config(family, seed)).to(dtype).eval()
    with torch.no_grad():  # norms and biases start at constants, which would hide a missing one
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


@dataclass(frozen=True)
class Converted:
    spec: ModelSpec
    slots: dict[str, torch.Tensor]
    banks: list[ExpertBank | None]


def convert(model: transformers.PreTrainedModel) -> Converted:
    """Weights of a transformers model, with its fused expert tensors, as our slots and banks."""
    spec = spec_from_hf(model.config.to_dict())
    state = model.state_dict()
    slots = {"embed": state["model.embed_tokens.weight"], "final_norm": state["model.norm.weight"]}
    if not spec.tie_embeddings:
        slots["lm_head"] = state["lm_head.weight"]
    banks: list[ExpertBank | None] = []
    for index, layer in enumerate(spec.layers):
        source, target = f"model.layers.{index}.", f"layers.{index}."
        get = lambda name, source=source: state.get(source + name)  # noqa: E731
        mine = {
            "attn_norm": get("input_layernorm.weight"),
            "ffn_norm": get("post_attention_layernorm.weight"),
            "qkv": torch.cat([get(f"self_attn.{p}_proj.weight") for p in "qkv"]),
            "out": get("self_attn.o_proj.weight"),
            "out_bias": get("self_attn.o_proj.bias"),
            "q_norm": get("self_attn.q_norm.weight"),
            "k_norm": get("self_attn.k_norm.weight"),
            "router": get("mlp.gate.weight") if layer.sparse else None,
        }
        if get("self_attn.q_proj.bias") is not None:
            mine["qkv_bias"] = torch.cat([get(f"self_attn.{p}_proj.bias") for p in "qkv"])
        if not layer.sparse:
            mine["gate_up"] = torch.cat([get("mlp.gate_proj.weight"), get("mlp.up_proj.weight")])
            mine["down"] = get("mlp.down_proj.weight")
        if spec.shared_size and layer.sparse:
            shared = "mlp.shared_expert."
            mine["shared.gate_up"] = torch.cat([get(shared + "gate_proj.weight"), get(shared + "up_proj.weight")])
            mine["shared.down"] = get(shared + "down_proj.weight")
            mine["shared.gate"] = get("mlp.shared_expert_gate.weight")
        slots.update({target + name: tensor for name, tensor in mine.items() if tensor is not None})
        sparse = ExpertBank(get("mlp.experts.gate_up_proj"), get("mlp.experts.down_proj")) if layer.sparse else None
        banks.append(sparse)
    return Converted(spec, slots, banks)


def engine_of(
    model: transformers.PreTrainedModel | Converted,
    *,
    max_sweep_tokens: int | None = None,
    chunk_rows: int | None = None,
    banks: BankSource[ExpertBank] | None = None,
    weights: ModelWeights | None = None,
    **options,
) -> LocalEngine:
    """Our engine over the same weights, on the CPU; small chunks on request, so that chunk borders are crossed.
    ``banks``: where they come from; resident unless given. ``weights``: others than the model's.
    """
    import dataclasses

    converted = model if isinstance(model, Converted) else convert(model)
    element = converted.slots["embed"].dtype.itemsize
    memory = plan_memory(converted.spec, kind="cpu", element=element, budget=1 << 30, wanted=max_sweep_tokens)
    if chunk_rows is not None:
        memory = dataclasses.replace(memory, chunk_rows=chunk_rows, max_gathered_keys=2 * chunk_rows)
    weights = weights or weights_from_slots(converted.spec, converted.slots)
    banks = banks or ResidentBanks(converted.banks)
    return LocalEngine(converted.spec, weights, banks, memory, device=torch.device("cpu"), **options)


@torch.inference_mode()
def reference_logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits float32 [T, V] of one request alone, as transformers computes them."""
    _forget_lengths(model)
    return model(torch.as_tensor(tokens, dtype=torch.int64)[None], use_cache=False).logits[0].float().numpy()


@torch.inference_mode()
def smallest_routing_gap(model: transformers.PreTrainedModel, tokens: np.ndarray) -> float:
    """Least distance between the last chosen and the first rejected expert's probability, over layers and tokens.

    Below some 1e-5 two correct float32 implementations may choose differently, and their logits say nothing.
    """
    _forget_lengths(model)
    out = model.model(torch.as_tensor(tokens, dtype=torch.int64)[None], use_cache=False, output_router_logits=True)
    top_k, gaps = model.config.num_experts_per_tok, [1.0]
    for logits in out.router_logits or ():
        ordered = logits.float().softmax(-1).sort(-1, descending=True).values
        if ordered.shape[-1] > top_k:
            gaps.append(float((ordered[..., top_k - 1] - ordered[..., top_k]).min()))
    return min(gaps)


def _forget_lengths(model: transformers.PreTrainedModel) -> None:
    """Under dynamic rope transformers keeps the frequencies of the longest request so far for the shorter ones that
    come after it, down to the original context; a request alone has its own.
    """
    rotary = model.model.rotary_emb
    if rotary.rope_type == "dynamic":
        model.model.rotary_emb = type(rotary)(config=model.config)


def everything(tokens: np.ndarray) -> AtomicRequest:
    """Ask for the whole distribution at every position."""
    count = len(tokens)
    ids = np.tile(np.arange(VOCAB, dtype=np.int32), count)
    offsets = np.arange(count + 1, dtype=np.int32) * VOCAB
    return AtomicRequest(np.asarray(tokens, np.int32), np.arange(count, dtype=np.int32), ids, offsets, vocabulary=True)


def random_requests(seed: int, count: int = 8, longest: int = 60) -> list[np.ndarray]:
    """Token sequences that share prefixes of random length, with duplicates and prefixes of one another among them."""
    r = np.random.default_rng(seed)
    sequences: list[np.ndarray] = [r.integers(0, VOCAB, r.integers(1, longest + 1)).astype(np.int32)]
    while len(sequences) < count:
        parent = sequences[r.integers(len(sequences))]
        keep = int(r.integers(0, len(parent) + 1))
        tail = r.integers(0, VOCAB, r.integers(0 if keep else 1, 20))
        sequences.append(np.concatenate([parent[:keep], tail]).astype(np.int32)[:longest])
    return sequences
