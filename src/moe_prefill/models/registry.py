"""The families that can be computed, and the way from a raw config to a spec. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from ..core import ModelSpec
from ..errors import ModelError
from .common.fields import Config
from .common.names import Place, Spelling, placer
from .mixtral.config import spec_from_config as mixtral_spec
from .mixtral.names import spelling as mixtral_spelling
from .olmoe.config import spec_from_config as olmoe_spec
from .olmoe.names import spelling as olmoe_spelling
from .qwen2_moe.config import spec_from_config as qwen2_moe_spec
from .qwen2_moe.names import spelling as qwen2_moe_spelling
from .qwen3_moe.config import spec_from_config as qwen3_moe_spec
from .qwen3_moe.names import spelling as qwen3_moe_spelling


@dataclass(frozen=True, slots=True)
class Family:
    """One family: its ``model_type`` and language model class in transformers, its config and its tensor names."""

    model_type: str
    architecture: str
    spec_from_config: Callable[[Config], ModelSpec]
    spelling: Spelling

    def placer(self, spec: ModelSpec, names: Container[str]) -> Place:
        """From a tensor name in the checkpoint to its place; ``names`` are all names of the checkpoint."""
        return placer(spec, names, self.spelling)


FAMILIES: dict[str, Family] = {
    known.model_type: known
    for known in (
        Family("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe_spec, qwen3_moe_spelling),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", qwen2_moe_spec, qwen2_moe_spelling),
        Family("mixtral", "MixtralForCausalLM", mixtral_spec, mixtral_spelling),
        Family("olmoe", "OlmoeForCausalLM", olmoe_spec, olmoe_spelling),
    )
}


def family(model_type: str) -> Family:
    """The family of this ``model_type``; ModelError lists the supported ones."""
    if model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; supported: {_supported()}.")
    return FAMILIES[model_type]


def spec_from_hf(config: Config) -> ModelSpec:
    """The spec of a raw ``config.json``; ModelError names a field that is wrong, contradictory or not implemented."""
    return _family_of(config).spec_from_config(config)


def _family_of(config: Config) -> Family:
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ModelError(f"config field 'architectures' is {architectures!r}; supported: a list of class names.")
    if model_type is None:
        known = [each for each in FAMILIES.values() if each.architecture in architectures]
        if not known:
            raise ModelError(f"no model_type and architectures {architectures}; supported: {_supported()}.")
        return known[0]
    found = family(str(model_type))
    if architectures and found.architecture not in architectures:
        raise ModelError(
            f"architectures {architectures} with model_type {model_type!r} is not supported; supported: "
            f"{found.architecture} (a language model with its output head)."
        )
    return found


def _supported() -> str:
    return ", ".join(f"{known.model_type} ({known.architecture})" for known in FAMILIES.values())
