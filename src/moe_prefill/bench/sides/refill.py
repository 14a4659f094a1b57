"""Dummy weights for vLLM with the spread of ours; a module of its own, since vLLM imports it in its process."""

from __future__ import annotations

import torch

STD = 0.02
_SCALE = 2.0**-12  # of float8 weights: a power of two, so that it stays what it is where scales are powers of two


@torch.no_grad()
def refill(model: torch.nn.Module) -> int:
    """Fill parameters with N(0, 0.02), norms with 1, as result files' protocol asks; the number of values.

    vLLM's own dummies are within 0.001, which leaves float8 weights nearly all zero and routing to the embedding alone.
    """
    generator, count = None, 0
    for name, tensor in model.named_parameters():
        generator = generator or torch.Generator(tensor.device).manual_seed(7)
        count += tensor.numel()
        if "scale" in name:
            if tensor.is_floating_point():
                tensor.fill_(_SCALE)
        elif "norm" in name and tensor.dim() == 1:
            tensor.fill_(1.0)
        elif tensor.element_size() == 1 and tensor.is_floating_point():
            for part in tensor.unbind(0) if tensor.dim() > 2 else [tensor]:  # an expert at a time
                wide = torch.empty(part.shape, device=part.device).normal_(0.0, STD / _SCALE, generator=generator)
                part.copy_(wide.clamp_(-448, 448).to(part.dtype))
        elif tensor.is_floating_point():
            tensor.normal_(0.0, STD, generator=generator)
    return count
