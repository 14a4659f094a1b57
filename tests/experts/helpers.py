"""Banks of the test reference in memory of any level, and engines over them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from moe_prefill.core import AtomicRequest, ModelSpec
from moe_prefill.engine.banks import BankMemory
from moe_prefill.engine.local import LocalEngine
from moe_prefill.experts import Transport
from moe_prefill.memory import plan_memory
from moe_prefill.models.weights import weights_from_slots
from tests.reference import Converted, convert, engine_of, everything, random_model, random_requests

FOUR_LAYERS = 20  # a seed whose olmoe has four sparse layers of 7 experts

Wrap = Callable[[Transport], Transport]


@functools.cache
def model_of(family: str, seed: int, dtype: torch.dtype = torch.float32) -> Converted:
    return convert(random_model(family, seed, dtype))


def filled_memory(converted: Converted, levels: Sequence[str | None], **options) -> BankMemory:
    """Memory of the levels, filled through the loader's two callbacks."""
    dtype = converted.slots["embed"].dtype
    memory = BankMemory(
        converted.spec, levels, dtype=dtype, device=options.pop("device", torch.device("cpu")), **options
    )
    for layer, bank in enumerate(converted.banks):
        for field in ("gate_up", "down") if bank is not None else ():
            whole, slot = getattr(bank, field), f"banks.{layer}.{field}"
            part = memory.keep(slot, tuple(whole.shape))
            memory.allocate(slot, (len(part), *whole.shape[1:])).copy_(whole[part.start : part.stop])
    return memory


def wrapped(memory: BankMemory, wrap: Wrap) -> BankMemory:
    """The same memory with each of its transports in a wrapper."""
    memory._transports = {level: wrap(transport) for level, transport in memory._transports.items()}
    return memory


def all_levels(spec: ModelSpec, level: str) -> list[str | None]:
    return [level if layer.sparse else None for layer in spec.layers]


def cycled_levels(spec: ModelSpec, levels: Sequence[str]) -> list[str | None]:
    names = itertools.cycle(levels)
    return [next(names) if layer.sparse else None for layer in spec.layers]


def requests_of(seed: int, count: int = 8) -> list[AtomicRequest]:
    return [everything(tokens) for tokens in random_requests(seed, count)]


def scores(engine: LocalEngine, requests: Sequence[AtomicRequest]) -> torch.Tensor:
    """Every logit of every request, in one vector."""
    results = engine.score(requests)
    return torch.from_numpy(np.concatenate([result.logits.ravel() for result in results]))


def engine_on(device: torch.device, converted: Converted, banks, **options) -> LocalEngine:
    """An engine on a GPU (or a CPU) over banks that are there already."""
    slots = {name: tensor.to(device) for name, tensor in converted.slots.items()}
    element = converted.slots["embed"].dtype.itemsize
    memory = plan_memory(converted.spec, kind=device.type, element=element, budget=4 << 30)
    weights = weights_from_slots(converted.spec, slots)
    return LocalEngine(converted.spec, weights, banks, memory, device=device, **options)


def resident_on(device: torch.device, converted: Converted):
    return filled_memory(converted, all_levels(converted.spec, "resident"), device=device).source()


def streamed_engine(converted: Converted, memory: BankMemory, **options) -> LocalEngine:
    return engine_of(converted, banks=memory.source(), **options)
