"""The part of a config that the four families share, turned into a ModelSpec.

The truth is how transformers 5 computes with a field, not how its documentation describes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ...core import LayerSpec, ModelSpec
from ...errors import ModelError
from .fields import Config, Fields, refused
from .quantization import float8_blocks
from .rope import rope_from_fields

DTYPES = ("bfloat16", "float16", "float32")
Windows = Sequence[int | None]  # the attention window of every layer, in tokens and counting the token itself


def decoder_spec(
    fields: Fields,
    *,
    windows: Callable[[Fields, int], Windows],
    sparse: Sequence[bool] | None = None,
    expert_size: str,
    dense_size: str | None = None,
    default_theta: float = 10000.0,
    **special: Any,
) -> ModelSpec:
    """Read everything the families share, refuse what is left over, and build the spec.

    ``windows`` gives each layer's window from the fields and the number of layers; ``sparse`` says which layers have
    experts (None: all). ``expert_size`` and ``dense_size`` are the names of the fields that hold those sizes.
    ``special`` are the ModelSpec fields that only the family knows.
    """
    fields.choice("hidden_act", ("silu", "swish"))
    num_layers = fields.integer("num_hidden_layers")
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads, head_dim = _heads(fields, hidden_size, num_heads)
    num_experts, top_k = fields.experts(), fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise ModelError(f"{fields.family}: num_experts_per_tok is {top_k}, but there are {num_experts} experts.")
    rope, max_positions = rope_from_fields(fields, head_dim, default_theta)
    layer_windows = windows(fields, num_layers)
    _check_layer_types(fields, layer_windows)
    has_experts = [True] * num_layers if sparse is None else sparse
    spec = ModelSpec(
        family=fields.family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(sparse=s, window=w) for s, w in zip(has_experts, layer_windows, strict=True)),
        num_experts=num_experts,
        top_k=top_k,
        expert_size=fields.integer(expert_size),
        dense_size=fields.integer(dense_size) if dense_size else 0,
        norm_eps=fields.number("rms_norm_eps"),
        rope=rope,
        max_positions=max_positions,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
        float8_blocks=float8_blocks(fields),
        **special,
    )
    fields.finish()
    return spec


def no_windows(fields: Fields, num_layers: int) -> Windows:
    """A family whose reference masks nothing but the future."""
    if fields.raw("sliding_window") is not None:
        raise refused(fields.family, "sliding_window", fields.raw("sliding_window"), "null")
    return [None] * num_layers


def sparse_layers(fields: Fields) -> list[bool]:
    """The Qwen rule: every ``decoder_sparse_step``-th layer has experts, unless ``mlp_only_layers`` lists it."""
    num_layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step")
    dense = fields.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < num_layers for i in dense):
        raise refused(fields.family, "mlp_only_layers", dense, f"a list of layer numbers from 0 to {num_layers - 1}")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]


def declared_dtype(config: Config) -> str | None:
    """What the config says of the weights' type, without a ``torch.`` in front, or None where it says nothing."""
    value = config.get("dtype") or config.get("torch_dtype")
    return None if value in (None, "auto") else str(value).removeprefix("torch.")


def _heads(fields: Fields, hidden_size: int, num_heads: int) -> tuple[int, int]:
    null_means_all = "num_key_value_heads" in fields.config and fields.raw("num_key_value_heads") is None
    num_kv_heads = num_heads if null_means_all else fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{fields.family}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}."
        )
    if fields.raw("head_dim") is None and hidden_size % num_heads:
        raise ModelError(
            f"{fields.family}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads} and "
            "head_dim is not given."
        )
    return num_kv_heads, fields.integer("head_dim", default=hidden_size // num_heads)


def _dtype(fields: Fields) -> Literal["float32", "bfloat16", "float16"]:
    value = declared_dtype(fields.config) or "float32"
    for known in DTYPES:
        if value == known:
            return known  # type: ignore[return-value]
    raise refused(fields.family, "dtype", value, ", ".join(DTYPES))


def _check_layer_types(fields: Fields, windows: Windows) -> None:
    """``layer_types`` may repeat what the windows say; a different list would be another model."""
    given = fields.raw("layer_types")
    if given is None:
        return
    meant = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if given != meant:
        raise refused(fields.family, "layer_types", given, f"{meant}, as the family's other fields say")
