"""How a checkpoint's matrices are quantised, by its config: float8 blocks are computed, everything else is refused."""

from __future__ import annotations

from collections.abc import Mapping

from .fields import Fields, is_off, refused

# What may be said of float8 blocks; ``modules_to_not_convert`` repeats what the tensors' own types say.
_MEANT: dict[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "weight_block_size": ([128, 128],),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("float", None),
}
_FREE = ("modules_to_not_convert",)
_SUPPORTED = (
    "checkpoints in bfloat16, float16 or float32, or in fp8 (e4m3) with weight_block_size [128, 128] and dynamic "
    "activation scales"
)


def float8_blocks(fields: Fields) -> bool:
    """Whether linear maps are stored as float8 with a scale for each block of 128 x 128. ModelError: they are quantised
    in another way.
    """
    for name in ("quantization_config", "compression_config"):
        settings = fields.raw(name)
        if not settings:
            continue
        fault = _fault(settings) if name == "quantization_config" else None
        if fault is None and name == "quantization_config":
            return True
        raise refused(
            fields.family, name, fault or _method(settings), _SUPPORTED, "Use the unquantised checkpoint of this model."
        )
    return False


def _fault(settings: object) -> str | None:
    """What of the settings is not computed, or None."""
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "fp8":
        return _method(settings)
    for key, meant in _MEANT.items():
        if settings.get(key) not in meant:
            return f"quantisation method 'fp8' with {key} {settings.get(key)!r}"
    unknown = [key for key, value in settings.items() if key not in (*_MEANT, *_FREE) and not is_off(value)]
    return f"quantisation method 'fp8' with {unknown[0]} {settings[unknown[0]]!r}" if unknown else None


def _method(settings: object) -> str:
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
    return f"quantisation method {method!r}"
