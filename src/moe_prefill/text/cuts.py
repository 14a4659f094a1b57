"""Where a text may be cut so that tokenising both sides alone gives the tokens of the whole.

Labels of one row share its context and candidates share their prompt's head. Knowing a safe place to cut, the shared
part is tokenised once and only a few characters again for each label. A cut is offered only for tokenizers whose
structure proves it exact; for any other, ``make_cut_rule`` returns None and whole texts are tokenised.

Two structures are known. Byte-level BPE splits a text by a regular expression before it merges: a piece that ends in a
non-space character cannot reach over a following space, and one that ends in a letter or digit cannot reach over a
line break, whatever comes later. Word-marker BPE (SentencePiece style) replaces a space by U+2581: where no token of
the vocabulary has that mark after another character, no merge can cross a space.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

MARK = "\u2581"

# Alternatives of pre-tokenizer expressions that match no space after another character, no line break after a letter
# or digit, and look at most one character past their end.
_SAFE_ALTERNATIVES = frozenset(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"(?i:[sdmt]|ll|ve|re)",
        *(f"'{ending}" for ending in ("s", "t", "re", "ve", "m", "ll", "d")),
        r" ?\p{L}+",
        r" ?\p{N}+",
        r" ?[^\s\p{L}\p{N}]+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}",
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True, slots=True)
class CutRule:
    """Safe places to cut.

    ``marks``: the tokenizer writes spaces as word marks; ``prepends``: and puts one in front itself. ``line_breaks``
    allows cuts before a line break too. ``alone``: a space or break is cut at only where no other follows, for longer
    runs are added tokens. ``starts`` and ``ends`` are the first and last characters of added tokens.
    """

    marks: bool
    prepends: bool
    line_breaks: bool
    alone: bool
    starts: frozenset[str] = frozenset()
    ends: frozenset[str] = frozenset()

    def last(self, text: str, stop: int) -> int:
        """The largest safe cut p with ``0 < p < stop``, or 0 where there is none. Looks at ``text[:p + 2]`` only."""
        while True:
            space = text.rfind(" ", 1, stop)
            line = text.rfind("\n", max(space, 1), stop) if self.line_breaks else -1
            p = max(space, line)
            if p < 1:
                return 0
            if self._is_safe(text, p, stop):
                return p
            stop = p

    def window(self, text: str, p: int) -> str:
        """What to tokenise for ``text[p:]`` so that the tokens are those that follow ``text[:p]``."""
        return text[p + 1 :] if self.prepends else text[p:]

    def _is_safe(self, text: str, p: int, stop: int) -> bool:
        before = text[p - 1]
        if before.isspace() or (self.marks and before == MARK):
            return False
        if self.alone and (p + 1 >= stop or text[p + 1].isspace()):
            return False
        if text[p] == "\n":
            return unicodedata.category(before)[0] in "LN" and not unicodedata.decomposition(before)
        if self.prepends:
            # A mark goes in front of every segment between added tokens: next to one, the space and the mark would
            # not be the same. Nor may the window be empty, which gets no mark.
            return p + 1 < stop and text[p + 1] not in self.starts and before not in self.ends
        return True


def make_cut_rule(backend: tokenizers.Tokenizer) -> CutRule | None:
    """The rule for this tokenizer, or None where none is proven."""
    added = list(backend.get_added_tokens_decoder().values())
    runs = [token for token in added if len(token.content) > 1 and token.content.isspace()]
    others = [token for token in added if token not in runs]
    if any(_holds_space(token.content) or token.single_word or token.lstrip or token.rstrip for token in others):
        return None
    layout = _layout(backend)
    if layout["model"] != "BPE":
        return None
    normalizers, splitters = _flatten(layout["normalizer"]), _flatten(layout["pre_tokenizer"])
    if all(step["type"] == "NFC" for step in normalizers) and _is_byte_level(splitters):
        line_breaks = not any(step.get("add_prefix_space") for step in splitters)
        return CutRule(marks=False, prepends=False, line_breaks=line_breaks, alone=bool(runs))
    mark_free = not any(MARK in token.content for token in added)
    if _writes_marks(normalizers, splitters) and not runs and mark_free and not _mark_inside_token(backend):
        prepends = any(step["type"] == "Prepend" for step in normalizers)
        starts = frozenset(token.content[0] for token in added if token.content)
        ends = frozenset(token.content[-1] for token in added if token.content)
        return CutRule(marks=True, prepends=prepends, line_breaks=False, alone=False, starts=starts, ends=ends)
    return None


def _layout(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The parts of tokenizer.json that matter here; the vocabulary, which is most of it, is not serialised."""

    def state(part: Any) -> Any:
        return None if part is None else json.loads(part.__getstate__())

    return {
        "model": type(backend.model).__name__,
        "normalizer": state(backend.normalizer),
        "pre_tokenizer": state(backend.pre_tokenizer),
    }


def _flatten(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("normalizers") or part.get("pretokenizers") or []
        return [step for entry in inner for step in _flatten(entry)]
    return [part]


def _is_byte_level(splitters: list[Mapping[str, Any]]) -> bool:
    if not splitters or splitters[-1]["type"] != "ByteLevel":
        return False
    return all(_is_safe_splitter(step) for step in splitters) and any(_splits_at_spaces(step) for step in splitters)


def _is_safe_splitter(step: Mapping[str, Any]) -> bool:
    if step["type"] in ("ByteLevel", "Digits"):
        return True
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return False
    return all(option in _SAFE_ALTERNATIVES for option in _alternatives(step["pattern"].get("Regex", "")))


def _splits_at_spaces(step: Mapping[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    return step["type"] == "Split" and r"\s+" in _alternatives(step["pattern"].get("Regex", ""))


def _alternatives(pattern: str) -> list[str]:
    """Split an expression at its top-level bars; line breaks that stand for themselves are written out."""
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    options, depth, start, i = [], 0, 0, 0
    in_class = False
    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            i += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            options.append(pattern[start:i])
            start = i + 1
        i += 1
    return [*options, pattern[start:]]


def _writes_marks(normalizers: list[Mapping[str, Any]], splitters: list[Mapping[str, Any]]) -> bool:
    def is_replace(step: Mapping[str, Any]) -> bool:
        return (step["type"], step.get("pattern"), step.get("content")) == ("Replace", {"String": " "}, MARK)

    def is_prepend(step: Mapping[str, Any]) -> bool:
        return (step["type"], step.get("prepend")) == ("Prepend", MARK)

    if splitters:
        metaspace = [step for step in splitters if step["type"] == "Metaspace" and step["replacement"] == MARK]
        return not normalizers and len(splitters) == 1 and len(metaspace) == 1
    return any(map(is_replace, normalizers)) and all(is_replace(step) or is_prepend(step) for step in normalizers)


def _mark_inside_token(backend: tokenizers.Tokenizer) -> bool:
    """Whether some token has a word mark after another character."""
    return any(MARK in token.lstrip(MARK) for token in backend.get_vocab(with_added_tokens=False))


def _holds_space(text: str) -> bool:
    return any(char.isspace() for char in text)
