"""Reads a tokenizer's files from a model directory; knows where Hugging Face checkpoints keep what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import ModelError

_SLOW_FILES = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")
_DIGESTED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    *_SLOW_FILES,
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A loaded tokenizer and what its files say about it.

    ``special_tokens`` maps names such as "bos_token" to strings. ``fingerprint`` digests every file that may change a
    token.
    """

    backend: tokenizers.Tokenizer
    config: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    chat_template: str | None
    fingerprint: str


def load_files(directory: str | Path) -> TokenizerFiles:
    """Load the tokenizer of a model directory. Raises ModelError with the remedy where there is none."""
    path = Path(directory)
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory, so no tokenizer can be read from it")
    config = _read_json(path / "tokenizer_config.json")
    legacy = _read_json(path / "special_tokens_map.json")
    special_tokens = _special_tokens(config, legacy)
    backend = _load_backend(path)
    backend.no_truncation()
    backend.no_padding()
    _complete_added_tokens(backend, path, config, legacy)
    template = _chat_template(path, config)
    return TokenizerFiles(backend, config, special_tokens, template, _fingerprint(path))


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    fast = path / "tokenizer.json"
    if fast.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(fast))
        except Exception as error:  # the library raises bare Exception for damaged files
            raise ModelError(f"{fast} cannot be read as a tokenizer: {error}") from error
    slow = [name for name in _SLOW_FILES if (path / name).is_file()]
    if not slow:
        raise ModelError(f"{path} holds no tokenizer: tokenizer.json is missing; copy it from the published model")
    return _convert_slow(path, slow[0])


def _convert_slow(path: Path, found: str) -> tokenizers.Tokenizer:
    """Let transformers convert an older tokenizer format, where it is installed."""
    try:
        import transformers
    except ImportError:
        raise ModelError(
            f"{path} has {found} but no tokenizer.json; converting it needs transformers: "
            "pip install 'moe-prefill[convert]' sentencepiece, or copy a tokenizer.json there"
        ) from None
    try:
        converted = transformers.AutoTokenizer.from_pretrained(str(path), use_fast=True, local_files_only=True)
        backend = converted.backend_tokenizer
    except Exception as error:  # whatever the conversion meets belongs to this model's files
        raise ModelError(f"{path / found} cannot be converted by transformers: {error}") from error
    assert isinstance(backend, tokenizers.Tokenizer), type(backend)
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _special_tokens(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, str]:
    # The older special_tokens_map.json wins only where the config does not list its tokens itself.
    first, second = (config, legacy) if "added_tokens_decoder" in config else (legacy, config)
    tokens = {}
    for name in (*_NAMED_TOKENS, *(key for key in (*config, *legacy) if key.endswith("_token"))):
        value = first.get(name, second.get(name))
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            tokens[name] = text
    return tokens


def _complete_added_tokens(
    backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any], legacy: Mapping[str, Any]
) -> None:
    """Teach the backend the added tokens of the other files, in the order in which transformers does it: those with an
    id, whose flags win over tokenizer.json's, then the named and the further special ones, with the next free ids.
    """
    named = _special_tokens(config, legacy).values()
    further = [_added(token, special=True) for token in _further_tokens(config, legacy)]
    special = {*named, *(token.content for token in further)}
    for index, token in sorted(_tokens_with_ids(path, backend, config, special).items()):
        backend.add_tokens([token])
        got = backend.token_to_id(token.content)
        if got != index:
            raise ModelError(
                f"{path} places the token {token.content!r} at id {index}, but tokenizer.json at {got}: the files do "
                "not belong together"
            )
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    special_tokens = [*(_added(text, special=True) for text in named), *further]
    backend.add_tokens([token for token in special_tokens if token.content not in present])
    backend.encode_special_tokens = config.get("split_special_tokens") is True


def _tokens_with_ids(
    path: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Collection[str]
) -> dict[int, tokenizers.AddedToken]:
    """The config's ``added_tokens_decoder``; where it has none, what the older ``added_tokens.json`` adds."""
    if "added_tokens_decoder" in config:
        return {int(index): _added(entry) for index, entry in (config["added_tokens_decoder"] or {}).items()}
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    return {
        index: tokenizers.AddedToken(text, normalized=text not in special, special=text in special)
        for text, index in _read_json(path / "added_tokens.json").items()
        if text not in present
    }


def _further_tokens(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> list[Any]:
    """Special tokens without a role; a mapping gives them names that no tokenizer reads."""
    stated = config if "added_tokens_decoder" in config else {**config, **legacy}
    tokens = stated.get("extra_special_tokens") or stated.get("additional_special_tokens") or []
    return list(tokens.values() if isinstance(tokens, dict) else tokens)


def _added(entry: Any, **flags: bool) -> tokenizers.AddedToken:
    """From a text, or from an object with the token's flags."""
    stated = {"content": entry} if isinstance(entry, str) else entry
    if not isinstance(stated, dict) or not isinstance(stated.get("content"), str):
        raise ModelError(f"tokenizer_config.json lists the added token {entry!r}; a text or an object with content")
    flags |= {key: bool(stated[key]) for key in _TOKEN_FLAGS if key in stated}
    return tokenizers.AddedToken(stated["content"], **flags)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: its own file first, then the config's string or list of named templates."""
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    value = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}
    if isinstance(value, dict):
        if "default" not in value:
            raise ModelError(f"{path} names its chat templates {sorted(value)}; one called 'default' is needed")
        value = value["default"]
    return value if isinstance(value, str) else None


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256(tokenizers.__version__.split(".")[0].encode())
    for name in sorted(_DIGESTED):
        file = path / name
        if file.is_file():
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{name}={content};".encode())
    return digest.hexdigest()[:32]
