"""What request bodies have in common: strict types, fields that are understood and refused, prompts in any form."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ..core import Int32Array
from .context import Context
from .refusals import bad_request

_TEXT: dict[str, Any] = {"type": "string"}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def either(*schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(schemas)})


def list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


# Checked by ``prompts_of`` and ``Context.ids``: pydantic would try every form of a union on every token.
Prompts = Annotated[Any, either(_TEXT, list_of(_TEXT), list_of(_IDS["items"]), list_of(_IDS))]
Texts = Annotated[Any, either(_TEXT, list_of(_TEXT))]
TextOrIds = Annotated[Any, either(_TEXT, _IDS)]
Ids = Annotated[Any, WithJsonSchema(_IDS)]
Items = Annotated[Any, either(_TEXT, list_of(_TEXT), list_of(_IDS))]


class Body(BaseModel):
    """Base of the bodies that others have defined: what they may add later is let through unread."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    user: str | None = None
    cache_salt: str | None = Field(None, description="Requests of different salts never share computed prefixes.")


def refuse_fields(body: dict[str, Any], refused: dict[str, tuple[object, ...]]) -> None:
    """Raise 400 for a field that asks for what this server does not do."""
    for name, harmless in refused.items():
        value = body.get(name)
        if (
            name in body
            and value is not None
            and not any(value == one and type(value) is type(one) for one in harmless)
        ):
            met = json.dumps(value, ensure_ascii=False)[:60]
            raise bad_request(
                "unsupported",
                f"{name} is {met}, which this server does not do: it scores prompts in one forward pass and generates "
                f"at most one token; leave {name} out",
                name,
            )


def prompts_of(context: Context, value: object, param: str, *, add_special_tokens: bool = True) -> list[Int32Array]:
    """A text, texts, ids or lists of ids as ids; those given as ids are taken as they are."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise bad_request(
            "bad_prompt", f"{param} is a text, a list of texts, token ids or a list of lists of them", param
        )
    if value and all(type(entry) is int for entry in value):
        value = [value]
    context.check_rows(len(value), param)
    texts = [entry for entry in value if isinstance(entry, str)]
    if len(texts) == len(value):
        return context.encode(texts, param, add_special_tokens=add_special_tokens)
    if all(isinstance(entry, list) for entry in value):
        return [context.ids(entry, f"{param}[{index}]") for index, entry in enumerate(value)]
    said = "mixes kinds of entries, or has one that is none: all are texts, token ids or lists of token ids"
    raise bad_request("bad_prompt", f"{param} {said}", param)


def texts_of(context: Context, value: object, param: str) -> list[str]:
    """A text or a list of texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise bad_request("bad_text", f"{param} is a text or a list of texts", param)
    context.check_rows(len(texts), param)
    return texts
