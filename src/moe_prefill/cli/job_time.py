"""How long a job would take, from a sample of its requests and the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import EngineConfig
from ..core import AtomicRequest, EngineLimits, ModelSpec
from ..costmodel import Batch, predict_sweep
from ..errors import UsageError
from ..forming import Forming, sharing_rule
from ..machine import MachineProfile, estimated_profile, load_profile
from ..memory import sweep_sizes
from .plan import planned_spec


@dataclass(frozen=True, slots=True)
class JobTime:
    """Predicted seconds of the sampled requests, at the rate of full sweeps; on ``profile``'s machine."""

    sample_s: float
    profile: MachineProfile


def predict_job(config: EngineConfig, requests: Sequence[AtomicRequest], copies: int) -> JobTime | None:
    """The time of a sample of a job that is about ``copies`` times as large, with every bank resident.

    Requests share prefixes within the sample, as the engine would let them. None: there is no profile, and nothing is
    known of this device. UsageError: the profile is damaged, another device's, or lacks the precision.
    """
    gpu = _gpu(config)
    profile = _profile(config, gpu or "cpu")
    if profile is None:
        return None
    spec = planned_spec(config)
    limit = sweep_sizes("cuda" if gpu else "cpu", config.max_sweep_tokens, config.chunk_rows)[0][0]
    sweeps = _sweeps(config, spec, requests, limit)
    fill = max(1, min(copies, limit // sum(batch.num_tokens for batch in sweeps)))  # of one sweep, by a small sample
    precision = _precision(config, spec, gpu)
    predictions = [predict_sweep(spec, batch.times(fill), profile, precision=precision) for batch in sweeps]
    return JobTime(sum(each.sweep_s for each in predictions) / fill / (config.gpus or 1), profile)


def _gpu(config: EngineConfig) -> str | None:
    """The name of the GPU that the job would run on; None: on the CPU."""
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(None if config.device == "auto" else config.device)


def _precision(config: EngineConfig, spec: ModelSpec, gpu: str | None) -> str:
    """Of the experts, as the engine picks it: the published type, in a wider one where it is float16."""
    if config.quantization == "fp8" or spec.float8_blocks:
        return "float8"
    wanted = spec.dtype if config.dtype == "auto" else config.dtype
    return ("bfloat16" if gpu else "float32") if wanted == "float16" else wanted


def _sweeps(
    config: EngineConfig, spec: ModelSpec, requests: Sequence[AtomicRequest], max_sweep_tokens: int
) -> list[Batch]:
    """The batches of the sweeps that an engine would form."""
    longest = max(len(request.tokens) for request in requests)
    limits = EngineLimits(
        max_request_tokens=longest, max_sweep_tokens=max(longest, max_sweep_tokens), vocab_size=spec.vocab_size
    )
    private = spec.rope.original_max_positions if spec.rope.kind == "dynamic" else None
    forming = Forming(limits=limits, rule=sharing_rule(spec, config.sharing), private_beyond=private)
    salts = forming.salts(requests)
    return [
        Batch.from_requests([requests[i] for i in sweep], [salts[i] for i in sweep], forming.rule, spec.vocab_size)
        for sweep in forming.sweeps(requests, range(len(requests)))
    ]


def _profile(config: EngineConfig, device_name: str) -> MachineProfile | None:
    if config.profile is not None:
        return load_profile(config.profile, gpu=device_name)
    try:
        return estimated_profile(device_name)
    except UsageError:  # not a mistake of the user's: he asked for no time
        return None
