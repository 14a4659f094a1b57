"""Train the demo model: a small Qwen3-MoE that classifies mails and reviews, in minutes on one GPU.

Why: no published MoE checkpoint is small enough to sit in a source tree, and a random one cannot show that scores mean
anything. One mixture teaches both language (loss on the texts' tokens) and the tasks (loss on the answer); answers
weigh little at first, so that features come before labels are learned by heart.

    python examples/demo_model/train.py --data build/demo_data --tokenizer build/demo_data --out build/demo_model

Writes a bf16 checkpoint in the published Qwen3-MoE layout, the tokenizer, and metrics.json, measured on the test split
with the checkpoint as reloaded from disk. Needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from batches import IGNORE, MAX_TEXT, Batches, load
from evaluate import Prompt, all_forms, evaluate, make_prompts, task_accuracy
from prompts import END, PAD
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

WARMUP, LANGUAGE_PART = 0.04, 0.35  # parts of the run: learning-rate warm-up; answers weigh little
LABEL_SMOOTHING, BALANCE_WEIGHT = 0.05, 0.02


def make_config(tokenizer: Tokenizer, layers: int) -> Qwen3MoeConfig:
    """About 13.5 million parameters at 6 layers: 9.4 in experts, 2.1 in the shared embedding, 2.0 in attention."""
    return Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,  # unused: every layer is sparse
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        router_aux_loss_coef=BALANCE_WEIGHT,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=None,  # padding trains like any token: it stands for a hidden word
    )


def grouped_experts(experts: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward of one bank of experts as two grouped matrix products over tokens sorted by expert."""

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        top_k = chosen.shape[-1]
        by_expert = chosen.reshape(-1).argsort()
        counts = F.one_hot(chosen.reshape(-1), experts.num_experts).sum(0)
        ends = counts.cumsum(0).to(torch.int32)
        rows = hidden[by_expert // top_k]
        gate, up = F.grouped_mm(rows, experts.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, experts.down_proj.transpose(1, 2), offs=ends)
        back = torch.empty_like(by_expert)
        back[by_expert] = torch.arange(len(back), device=back.device)
        return (out[back].view(-1, top_k, out.shape[-1]) * weights.unsqueeze(-1)).sum(1)

    return forward


class Router:
    """Watches the routers: the balance loss of the current step, and how evenly experts are used."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.experts, self.layers = model.config.num_experts, model.config.num_hidden_layers
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.seen.append((out[0], out[2])))

    def balance(self, real: Tensor) -> Tensor:
        """Switch-style balance loss, per layer and then averaged; `real` marks rows that are no padding."""
        total = real.sum()
        losses = []
        for logits, chosen in self.seen:
            share = (F.one_hot(chosen, self.experts).sum(1) * real[:, None]).sum(0) / (total * chosen.shape[-1])
            probability = (logits.float().softmax(-1) * real[:, None]).sum(0) / total
            losses.append(self.experts * (share * probability).sum())
        self.seen.clear()
        return torch.stack(losses).mean()

    def shares(self) -> dict[str, float]:
        """Least and greatest share of tokens any expert of any layer got in what was seen, as multiples of even."""
        calls = torch.stack([torch.bincount(chosen.flatten(), minlength=self.experts) for _, chosen in self.seen])
        counts = calls.view(-1, self.layers, self.experts).sum(0).float()
        share = counts * self.experts / counts.sum(1, keepdim=True)
        self.seen.clear()
        return {"least": round(float(share.min()), 3), "greatest": round(float(share.max()), 3)}


def prepare_training(model: Qwen3MoeForCausalLM, dropout: float) -> None:
    """Fast experts and norms, and dropout on what each block adds to the residual stream, for training only."""

    def drop(module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        return F.dropout(out, dropout, module.training)

    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.forward = grouped_experts(module)
        elif type(module).__name__ == "Qwen3MoeRMSNorm":
            module.forward = lambda x, m=module: F.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


class MasterAdamW:
    """AdamW on fp32 copies of bf16 parameters: forward and backward stay in bf16, small updates are not lost."""

    def __init__(self, model: nn.Module, weight_decay: float, fused: bool) -> None:
        self.params = list(model.parameters())
        self.masters = [param.detach().float().clone() for param in self.params]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)

    def step(self, rate: float) -> None:
        """Take one step at learning rate `rate`, write the parameters back, and clear their gradients."""
        torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.params])
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        for param in self.params:
            param.grad = None


def step_losses(model: Qwen3MoeForCausalLM, router: Router, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Language-model loss, answer loss, and balance loss of one batch."""
    inputs, targets, answers = batch["inputs"], batch["targets"], batch["answers"]
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    real = torch.arange(inputs.shape[1], device=inputs.device) < batch["lengths"][:, None]
    language = F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
    rows = torch.arange(len(inputs), device=inputs.device)
    log_probs = model.lm_head(hidden[rows, batch["answer_at"]]).float().log_softmax(-1)
    scores = log_probs.gather(1, answers.clamp(min=0))
    even = (scores * (answers >= 0)).sum(1) / (answers >= 0).sum(1)
    right = scores.gather(1, batch["right"][:, None])[:, 0]
    answer = -((1 - LABEL_SMOOTHING) * right + LABEL_SMOOTHING * even).mean()
    return language, answer, router.balance(real.flatten().float())


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    if progress < WARMUP:
        return peak * max(progress / WARMUP, 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


class Keeper:
    """Early stopping: keeps the weights that did best on the validation split, the later ones when equal."""

    def __init__(self, model: Qwen3MoeForCausalLM, prompts: list[Prompt]) -> None:
        self.model, self.prompts = model, prompts
        self.score, self.state, self.chosen, self.checked = -1.0, dict[str, Tensor](), dict[str, float](), 0

    def check(self, step: int) -> None:
        """Measure the model as it is now, and keep it if none was better."""
        means, self.checked = task_accuracy(evaluate(self.model, self.prompts)), step
        print(f"step {step}  valid {means}", flush=True)
        if sum(means.values()) >= self.score:
            self.score = sum(means.values())
            self.state = {name: param.detach().clone() for name, param in self.model.named_parameters()}
            self.chosen = {"step": step, **{f"valid_{task}": round(mean, 4) for task, mean in means.items()}}


def train(model: Qwen3MoeForCausalLM, args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, object]:
    """Train in place, keep the weights that did best on the validation split, and tell what was spent."""
    texts = load(args.data / "train.jsonl.gz", tokenizer, args.limit)
    valid = load(args.data / "valid.jsonl.gz", tokenizer, args.limit)
    valid_prompts = make_prompts(valid, tokenizer, [("classify", False), ("binary", True)], seed=args.seed)
    stream = Batches(texts, tokenizer, args.batch_tokens, args.seed, args.corrupt)
    cuda = args.device.startswith("cuda")
    loader = DataLoader(stream, batch_size=None, num_workers=args.workers, pin_memory=cuda)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork below
    batches = iter(loader)  # workers start here, before this process touches the GPU
    model.to(args.device)
    prepare_training(model, args.dropout)
    router, optimizer = Router(model), MasterAdamW(model, args.weight_decay, fused=cuda)
    keeper, step, tokens, started = Keeper(model, valid_prompts), 0, 0, time.monotonic()
    while (progress := max(step / args.steps, (time.monotonic() - started) / args.seconds)) < 1:
        model.train()
        batch = {name: tensor.to(args.device, non_blocking=True) for name, tensor in next(batches).items()}
        language, answer, balance = step_losses(model, router, batch)
        early = progress < LANGUAGE_PART
        loss = (1.0 if early else 0.5) * language + (0.2 if early else 1.0) * answer + BALANCE_WEIGHT * balance
        loss.backward()
        optimizer.step(learning_rate(progress, args.rate))
        step, tokens = step + 1, tokens + batch["inputs"].numel()
        if step % args.log_every == 0:
            values = " ".join(f"{value.item():.3f}" for value in (language, answer, balance))
            print(f"{time.monotonic() - started:6.1f} s  step {step}  language, answer, balance {values}", flush=True)
        if progress > 0.5 and step % args.check_every == 0:
            keeper.check(step)
            router.seen.clear()
    if keeper.checked != step:
        keeper.check(step)
    model.load_state_dict(keeper.state, strict=False)
    seconds = round(time.monotonic() - started, 1)
    return {"steps": step, "tokens": tokens, "train_seconds": seconds, "chosen": keeper.chosen}


def save(model: Qwen3MoeForCausalLM, tokenizer_dir: Path, out: Path, tokenizer: Tokenizer) -> None:
    """Write the checkpoint as published ones look: one tensor per expert, plain names in config.json."""
    model.config.pad_token_id = tokenizer.token_to_id(PAD)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="13MB")
    (out / "generation_config.json").unlink(missing_ok=True)
    config_path = out / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("_experts_implementation", None)
    config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    names = {name for path in out.glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118
    for name in ("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj", "gate"):
        if f"model.layers.0.mlp.{name}.weight" not in names:
            raise SystemExit(f"unexpected checkpoint layout: no model.layers.0.mlp.{name}.weight")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, out / name)


def measure(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, object]:
    """Accuracy on the test split of the checkpoint on disk, with the library's own forward."""
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(args.device)
    router = Router(model)
    texts = load(args.data / "test.jsonl.gz", tokenizer, args.limit)
    results = evaluate(model, make_prompts(texts, tokenizer, all_forms(), seed=args.seed))
    return {
        "test": results,
        "test_mean_accuracy": {task: round(mean, 4) for task, mean in task_accuracy(results).items()},
        "expert_share": router.shares(),
        "parameters": sum(param.numel() for param in model.parameters()),
    }


def parse_args() -> argparse.Namespace:
    """The command line; defaults are what the shipped checkpoint was trained with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare_data.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder written by build_tokenizer.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=270.0, help="train no longer than this; the schedule shrinks")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--corrupt", type=float, default=0.1, help="mean share of words hidden in half of the examples")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--workers", type=int, default=8, help="processes that prepare batches")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--check-every", type=int, default=150)
    parser.add_argument("--limit", type=int, help="rows of each task and split, to try the script out")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, save, reload, measure."""
    args, started = parse_args(), time.monotonic()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32  # bf16 is slow on most CPUs
    model = Qwen3MoeForCausalLM(make_config(tokenizer, args.layers)).to(dtype)
    spent = train(model, args, tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.tokenizer, args.out, tokenizer)
    metrics = measure(args, tokenizer)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "options": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "max_text_tokens": MAX_TEXT,
        "total_seconds": round(time.monotonic() - started, 1),
    }
    (args.out / "metrics.json").write_text(json.dumps({**about, **spent, **metrics}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({**spent, **metrics}, indent=1))


if __name__ == "__main__":
    main()
