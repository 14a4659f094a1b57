"""Reading a raw ``config.json`` field by field, refusing what is wrong and what would change the mathematics unseen.

Every field belongs to one of three groups: read by the family, known to be harmless, or unknown. Unknown fields are
refused by name, because a model that is computed without one of its fields gives plausible wrong answers. An unknown
field passes only with a value that means "off" (null, false, zero, empty).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import ModelError

Config = Mapping[str, Any]

# Fields that never reach the forward pass of a trained causal language model: where it comes from, how it was trained,
# its tokens and labels, how the reference runs it, and its defaults for generation.
_HARMLESS = """
_name_or_path name_or_path _commit_hash architectures model_type transformers_version auto_map torch_dtype dtype
unsloth_version unsloth_fixed adapters license model_name finetuning_task base_model

attention_dropout hidden_dropout embd_pdrop resid_pdrop dropout initializer_range router_aux_loss_coef use_cache
router_jitter_noise router_z_loss_coef output_router_logits gradient_checkpointing

pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
tokenizer_class prefix task_specific_params id2label label2id num_labels problem_type
suppress_tokens begin_suppress_tokens bad_words_ids

output_attentions output_hidden_states return_dict torchscript tf_legacy_loss use_bfloat16 chunk_size_feed_forward
attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
experts_implementation _experts_implementation _experts_implementation_internal _flash_attn_2_enabled
keys_to_ignore_at_inference is_decoder cross_attention_hidden_size pretraining_tp tie_last_hidden_states

max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
top_k top_p typical_p min_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
num_return_sequences return_dict_in_generate output_scores exponential_decay_length_penalty remove_invalid_values
"""
HARMLESS = frozenset(_HARMLESS.split())

# Fields of the base class that mean something only with this value.
FIXED: dict[str, Any] = {"is_encoder_decoder": False, "add_cross_attention": False, "is_causal": True}


def refused(family: str, field: str, value: object, supported: str, remedy: str = "") -> ModelError:
    """The error for a field that cannot be computed: what it is, what is supported, what helps."""
    text = f"{family}: config field {field!r} is {_short(value)}; supported: {supported}."
    return ModelError(f"{text} {remedy}" if remedy else text)


class Fields:
    """A config being read. ``defaults`` are the values the reference gives to missing fields.

    Each reader marks its field as known; ``finish`` refuses the fields nobody knew. A field that is null reads as
    missing, except through ``optional_integer`` and ``optional_number``.
    """

    def __init__(self, config: Config, family: str, defaults: Config) -> None:
        self.config, self.family, self.defaults = config, family, defaults
        self._known: set[str] = set()

    def skip(self, *names: str) -> None:
        """Mark fields as known that this family's mathematics does not read."""
        self._known.update(names)

    def raw(self, name: str) -> Any:
        """The value as it stands, or None."""
        self._known.add(name)
        return self.config.get(name)

    def integer(self, name: str, *, default: int | None = None, minimum: int = 1) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise refused(self.family, name, value, f"a whole number of at least {minimum}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Null and missing differ: null is None, missing is the default."""
        if name in self.config and self.raw(name) is None:
            return None
        if name not in self.config and self.defaults.get(name) is None:
            return None
        return self.integer(name)

    def number(self, name: str, *, above: float = 0.0) -> float:
        return self.positive(name, self._value(name, None), above)

    def optional_number(self, name: str) -> float | None:
        value = self.raw(name)
        return None if value is None else self.positive(name, value, 0.0)

    def positive(self, name: str, value: object, above: float) -> float:
        """``value`` as a finite float greater than ``above``."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= above:
            raise refused(self.family, name, value, f"a number above {above:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._value(name, None)
        if not isinstance(value, bool):
            raise refused(self.family, name, value, "true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self._value(name, None)
        if value not in allowed:
            raise refused(self.family, name, value, " or ".join(map(repr, allowed)))
        return str(value)

    def fixed(self, name: str, value: object) -> None:
        """The family computes with ``value`` whatever the config says, so another value is refused."""
        met = self.raw(name)
        if met is not None and met != value:
            raise refused(self.family, name, met, f"{_short(value)}, which is what {self.family} computes")

    def experts(self) -> int:
        """The expert count, under the name of this family or of transformers' alias."""
        given = {name: self.raw(name) for name in ("num_experts", "num_local_experts")}
        values = {name: value for name, value in given.items() if value is not None}
        if len(set(map(repr, values.values()))) > 1:
            raise ModelError(f"{self.family}: config fields num_experts and num_local_experts disagree: {values}.")
        return self.integer(next(iter(values), "num_experts"))

    def finish(self) -> None:
        """Refuse every field that is neither known nor harmless nor off."""
        for name, value in FIXED.items():
            self.fixed(name, value)
        for name, value in self.config.items():
            if name not in self._known and name not in HARMLESS and not is_off(value):
                raise refused(
                    self.family,
                    name,
                    value,
                    "fields that this family's reference implementation reads",
                    "If the field does not change what the model computes, delete it from config.json.",
                )

    def _value(self, name: str, default: object) -> Any:
        value = self.raw(name)
        if value is not None:
            return value
        fallback = self.defaults.get(name, default)
        if fallback is None:
            raise ModelError(f"{self.family}: config field {name!r} is missing and the family has no default for it.")
        return fallback


def is_off(value: object) -> bool:
    return value is None or value is False or value in (0, "", [], {}, ())


def _short(value: object) -> str:
    text = value if isinstance(value, str) and value.startswith("quantisation") else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
