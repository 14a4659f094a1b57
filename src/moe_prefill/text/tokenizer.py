"""A model's tokenizer: texts to int32 ids and back, with the begin token added once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..core import Int32Array
from .cuts import make_cut_rule
from .files import TokenizerFiles, load_files

# A context, how many of its first characters other contexts share, and what may follow it.
Continued = tuple[str, int, Sequence[str]]
_PART_CHARS = 1 << 23  # of text that is encoded in one go


class Tokenizer:
    """Encodes and decodes with a ``tokenizers`` backend.

    ``add_special_tokens`` means the begin token only: an end token is never added, for a context that is closed has
    no continuation. Whether there is a begin token is said by ``add_bos_token`` in tokenizer_config.json, and by the
    post-processor of tokenizer.json where the config does not say it. A text that starts with the begin token gets no
    second one.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.backend = files.backend
        self.chat_template = files.chat_template
        self.special_tokens = dict(files.special_tokens)
        self.fingerprint = files.fingerprint
        self.bos = self.special_tokens.get("bos_token")
        self.eos = self.special_tokens.get("eos_token")
        self.bos_id = self._id(self.bos)
        self.eos_id = self._id(self.eos)
        self.prefix_ids = self._prefix_ids(files)
        self._cuts = make_cut_rule(self.backend)
        self._strings: dict[int, str] = {}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Load from a model directory. Raises ModelError with the remedy where that is impossible."""
        return cls(load_files(path))

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Int32Array:
        """Ids of one text, int32 [T]."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[Int32Array]:
        """Ids of each text, int32 [T] each."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return [self._with_prefix(row) for row in ids] if add_special_tokens else ids

    def encode_continued(
        self, contexts: Iterable[Continued], *, add_special_tokens: bool = True
    ) -> Iterator[list[Int32Array]]:
        """For each context the ids of its text alone, then of its text with each continuation: int32 [T] each.

        They are those of ``encode_batch``, but what texts have in common costs once: a context is cut at the last safe
        place before its end, and only what follows is encoded again with each continuation. Where the tokenizer has no
        such place, whole texts are encoded. At most ``_PART_CHARS`` of text are held beside the ids of one context.
        """
        index: dict[str, int] = {}
        plans: list[tuple[list[int], list[int]]] = []
        chars = 0
        for text, shared, continuations in contexts:
            *heads, tail = self._pieces(text, (shared, len(text)))
            tails = [tail, *(tail + continuation for continuation in continuations)]
            chars += sum(len(piece) for piece in (*heads, *tails) if piece not in index)
            plan = [[index.setdefault(piece, len(index)) for piece in pieces] for pieces in (heads, tails)]
            plans.append((plan[0], plan[1]))
            if chars > _PART_CHARS:
                yield from self._joined(list(index), plans, add_special_tokens)
                index, plans, chars = {}, [], 0
        yield from self._joined(list(index), plans, add_special_tokens)

    def _joined(
        self, pieces: list[str], plans: list[tuple[list[int], list[int]]], add_special_tokens: bool
    ) -> Iterator[list[Int32Array]]:
        """Of each plan its head pieces with each of its tails."""
        ids = self.encode_batch(pieces, add_special_tokens=False)
        for heads, tails in plans:
            head = [ids[i] for i in heads]
            rows = [np.concatenate([*head, ids[i]]) if head else ids[i] for i in tails]
            yield [self._with_prefix(row) for row in rows] if add_special_tokens else rows

    def encode_continuation(self, text: str) -> Int32Array:
        """Ids of a text as if it followed another, with no regard to how the two would merge: int32 [T]."""
        for anchor in ("\n", ".", "a"):
            before, whole = self.encode_batch([anchor, anchor + text], add_special_tokens=False)
            if np.array_equal(whole[: len(before)], before):
                return whole[len(before) :]
        return self.encode(text, add_special_tokens=False)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character ranges of the text's tokens, begin token not included."""
        return list(self.backend.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids; special tokens are written out."""
        return str(self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=False))

    def token_string(self, token_id: int) -> str:
        """The text that one token adds after another; bytes that are no full character come as U+FFFD."""
        if token_id not in self._strings:
            anchor = self.encode("a", add_special_tokens=False).tolist()
            before, whole = self.decode(anchor), self.decode([*anchor, token_id])
            self._strings[token_id] = whole[len(before) :] if whole.startswith(before) else self.decode([token_id])
        return self._strings[token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry as tokenizer.json writes it."""
        return self._id(token)

    def _pieces(self, text: str, lengths: Sequence[int]) -> list[str]:
        if self._cuts is None:
            return [text]
        cuts = [0]
        for length in lengths:
            cut = self._cuts.last(text, length)
            if cut > cuts[-1]:
                cuts.append(cut)
        ends = [*cuts[1:], len(text)]
        return [
            text[start:end] if start == 0 else self._cuts.window(text[:end], start)
            for start, end in zip(cuts, ends, strict=True)
        ]

    def _with_prefix(self, ids: Int32Array) -> Int32Array:
        prefix = self.prefix_ids
        if not len(prefix) or np.array_equal(ids[: len(prefix)], prefix):
            return ids
        return np.concatenate([prefix, ids])

    def _prefix_ids(self, files: TokenizerFiles) -> Int32Array:
        stated = files.config.get("add_bos_token")
        if stated is not None:
            found = [self.bos_id] if stated and self.bos_id is not None else []
        else:
            plain = self.backend.encode("a", add_special_tokens=False).ids
            full = self.backend.encode("a", add_special_tokens=True).ids
            starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
            found = full[: starts[-1]] if starts else []
        return np.array(found, dtype=np.int32)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)
