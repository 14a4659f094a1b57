"""Rotary parameters from a config: ``rope_theta`` and ``rope_scaling``, or transformers 5's ``rope_parameters``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from ...core import RopeSpec
from ...errors import ModelError
from .fields import Fields, refused

KINDS: tuple[str, ...] = get_args(get_type_hints(RopeSpec)["kind"])
_READ = """
rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale
mscale_all_dim truncate low_freq_factor high_freq_factor partial_rotary_factor finetuned
"""


def rope_from_fields(fields: Fields, head_dim: int, default_theta: float) -> tuple[RopeSpec, int]:
    """The rotary embedding and the longest request in tokens.

    As in transformers 5, a non-empty ``rope_scaling`` wins over ``rope_parameters``, a ``rope_theta`` inside the dict
    over one beside it, and an ``original_max_position_embeddings`` beside the dict over one inside. The longest request
    is ``max_position_embeddings``, stretched by ``factor`` where that field states the length before scaling: linear,
    dynamic, and yarn when it still holds less than the stretched original length.
    """
    dict_name, given = _rope_dict(fields)
    reader = Fields(given, f"{fields.family} {dict_name}", {})
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in KINDS:
        raise refused(reader.family, "rope_type", kind, ", ".join(KINDS))
    _refuse_unread(fields, reader)
    if head_dim % 2 or (kind == "dynamic" and head_dim == 2):
        raise ModelError(f"{fields.family}: head_dim is {head_dim}; {kind} rotation needs an even number above 2.")
    positions = fields.integer("max_position_embeddings")
    beside = fields.raw("original_max_position_embeddings")
    theta = given.get("rope_theta") or fields.raw("rope_theta") or default_theta
    fields.skip("rope_theta")
    common: dict[str, Any] = {"kind": kind, "theta": fields.positive("rope_theta", theta, 1.0), "dim": head_dim}
    if kind == "default":
        return RopeSpec(**common), positions
    if kind in ("linear", "dynamic"):
        factor = reader.number("factor")
        return RopeSpec(**common, factor=factor, original_max_positions=positions), int(positions * max(factor, 1.0))
    original = fields.integer("original_max_position_embeddings") if beside is not None else 0
    original = original or reader.integer("original_max_position_embeddings", default=positions)
    if kind == "llama3":
        return RopeSpec(**common, original_max_positions=original, **_llama3(reader)), positions
    factor = reader.number("factor") if reader.raw("factor") is not None else positions / original
    spec = RopeSpec(**common, factor=factor, original_max_positions=original, **_yarn(reader))
    return spec, max(positions, int(original * factor))


def _rope_dict(fields: Fields) -> tuple[str, Mapping[str, Any]]:
    scaling, parameters = fields.raw("rope_scaling"), fields.raw("rope_parameters")
    name, given = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters or {})
    if not isinstance(given, Mapping):
        raise refused(fields.family, name, given, "an object or null")
    return name, given


def _refuse_unread(fields: Fields, reader: Fields) -> None:
    for owner in (fields, reader):
        owner.fixed("partial_rotary_factor", 1.0)
    for name, value in reader.config.items():
        if name not in _READ.split() and value is not None:
            raise refused(reader.family, name, value, ", ".join(_READ.split()))


def _llama3(reader: Fields) -> dict[str, Any]:
    low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
    if high <= low:
        raise ModelError(f"{reader.family}: high_freq_factor {high:g} must be above low_freq_factor {low:g}.")
    return {"factor": reader.number("factor"), "low_freq_factor": low, "high_freq_factor": high}


def _yarn(reader: Fields) -> dict[str, Any]:
    """Zero means "not given" for the betas and the mscales, as in the reference."""
    truncate = reader.raw("truncate")
    if not (truncate is None or isinstance(truncate, bool)):
        raise refused(reader.family, "truncate", truncate, "true or false")
    return {
        "attention_factor": reader.optional_number("attention_factor"),
        "beta_fast": reader.optional_number("beta_fast") or 32.0,
        "beta_slow": reader.optional_number("beta_slow") or 1.0,
        "mscale": reader.optional_number("mscale"),
        "mscale_all_dim": reader.optional_number("mscale_all_dim"),
        "truncate": truncate is not False,
    }
