"""What is run: a cell's requests are a pure function of its name, the vocabulary and their number, so that ours and
every peer get the same token ids.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..core import AtomicRequest, Int32Array
from ..errors import UsageError

CANDIDATES = (11, 17)  # asked after the last token of every request
CHECKED_REQUESTS, CHECKED_TOKENS = 4, 32768  # whose logits both sides of a comparison give
_SHARING = re.compile(r"(\d+)x(\d+)@(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Requests of one shape: ``siblings`` requests behind each prefix of ``prefix`` tokens, with ``tail`` tokens of
    their own. Without sharing there is one sibling and no prefix.
    """

    siblings: int = 1
    tail: int
    prefix: int = 0

    @classmethod
    def parse(cls, text: str) -> Cell:
        """``4096``: tokens a request; ``8x16@2048``: siblings x tail @ prefix. UsageError for anything else."""
        found = _SHARING.fullmatch(text.strip())
        numbers = [int(group) for group in found.groups()] if found else []
        if text.strip().isdecimal() and int(text) > 0:
            return cls(tail=int(text))
        if numbers and min(numbers) > 0:
            return cls(siblings=numbers[0], tail=numbers[1], prefix=numbers[2])
        raise UsageError(
            f"cell {text!r} is neither tokens a request (4096) nor siblings x tail @ prefix (8x16@2048), all positive"
        )

    def __str__(self) -> str:
        return f"{self.siblings}x{self.tail}@{self.prefix}" if self.shares else str(self.tail)

    @property
    def shares(self) -> bool:
        return self.prefix > 0

    @property
    def tokens(self) -> int:
        """Tokens of one request."""
        return self.prefix + self.tail

    def families(self, computed_tokens: int) -> int:
        """How many prefixes fit into ``computed_tokens`` when each is computed once; at least one."""
        return max(1, computed_tokens // (self.prefix + self.siblings * self.tail))

    def rows(self, families: int, vocab_size: int) -> list[Int32Array]:
        """Token ids of all requests, int32 [tokens] each, family by family; fewer families are the first of more."""
        prefixes = np.random.default_rng([0, self.prefix]).integers(0, vocab_size, (families, self.prefix))
        tails = np.random.default_rng([1, self.tail]).integers(0, vocab_size, (families, self.siblings, self.tail))
        return [
            np.concatenate([prefix, tail]).astype(np.int32)
            for prefix, siblings in zip(prefixes, tails, strict=True)
            for tail in siblings
        ]

    def requests(self, families: int, vocab_size: int) -> list[AtomicRequest]:
        """One candidate set of two ids after each request's last token."""
        ids = [token % vocab_size for token in CANDIDATES]
        return [AtomicRequest.candidates(row, ids) for row in self.rows(families, vocab_size)]


def parse_cells(text: str) -> list[Cell]:
    """Several cells, separated by commas."""
    return [Cell.parse(part) for part in text.split(",")]
