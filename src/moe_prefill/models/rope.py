"""Rotary frequencies from a RopeSpec, equal to those of transformers.

``frequencies`` below are radians a token, float32 [dim / 2]; the attention factor multiplies cosine and sine.
"""

from __future__ import annotations

import math

import torch

from ..core import RopeSpec


def inverse_frequencies(rope: RopeSpec, length: int | None = None) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor for a request of ``length`` tokens, on the CPU.

    Only ``dynamic`` depends on ``length``: beyond the original context it stretches with the request, so two requests
    of different lengths share nothing there. None means a length within the original context.
    """
    if rope.kind == "linear":
        return _plain(rope.theta, rope.dim) / rope.factor, 1.0
    if rope.kind == "dynamic":
        return _plain(_dynamic_theta(rope, length), rope.dim), 1.0
    if rope.kind == "llama3":
        return _llama3(rope), 1.0
    if rope.kind == "yarn":
        return _yarn(rope), _yarn_attention_factor(rope)
    return _plain(rope.theta, rope.dim), 1.0


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _plain(theta: float | torch.Tensor, dim: int) -> torch.Tensor:
    return 1.0 / (theta ** _exponents(dim))


def _dynamic_theta(rope: RopeSpec, length: int | None) -> float | torch.Tensor:
    if length is None or length <= rope.original_max_positions:
        return rope.theta
    # The reference holds the length in a tensor, so this is float32 arithmetic there too.
    stretch = rope.factor * torch.tensor(length) / rope.original_max_positions - (rope.factor - 1)
    theta: torch.Tensor = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    return theta


def _llama3(rope: RopeSpec) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those between blended by their turns in the original context."""
    frequencies = _plain(rope.theta, rope.dim)
    turns = rope.original_max_positions / (2 * math.pi / frequencies)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    wave = 2 * math.pi / frequencies
    long = wave > rope.original_max_positions / rope.low_freq_factor
    short = wave < rope.original_max_positions / rope.high_freq_factor
    return torch.where(short, frequencies, torch.where(long, frequencies / rope.factor, blended))


def _yarn(rope: RopeSpec) -> torch.Tensor:
    """Channels with more than ``beta_fast`` turns in the original context are kept, under ``beta_slow`` stretched."""
    low, high = _yarn_channel(rope, rope.beta_fast), _yarn_channel(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    waves = rope.theta ** _exponents(rope.dim)
    stretched = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - stretched
    return 1.0 / (rope.factor * waves) * (1 - kept) + 1.0 / waves * kept


def _yarn_channel(rope: RopeSpec, turns: float) -> float:
    """The (fractional) channel that turns this many times within the original context."""
    return rope.dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
