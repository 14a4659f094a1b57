"""Names of prefixes: one 128-bit digest for each 16 tokens of a request, chained.

A block's digest names the model, the tenant, the salt and every token up to its end, so equal digests mean equal
prefixes under equal names: two different ones meet with probability 2^-64 after 2^32 blocks (68 billion tokens), and
nobody can search for a pair without finding a collision of BLAKE2b. So digests are compared and tokens are not.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import lru_cache
from hashlib import blake2b

from ..core import NOT_KEPT, Int32Array

BLOCK_TOKENS = 16
_BLOCK_BYTES = 4 * BLOCK_TOKENS
_DIGEST_BYTES = 16

Digest = bytes
Chain = Sequence[Digest]  # digests of a request's whole blocks, first block first


class BlockHasher:
    """Hashes the requests of one model."""

    def __init__(self, model: str) -> None:
        self._root = lru_cache(maxsize=4096)(lambda tenant, salt: _root(model, tenant, salt))

    def chain(self, tokens: Int32Array, *, tenant: str = "", salt: str = "") -> list[Digest]:
        """Digests of the whole blocks of ``tokens`` (int32 [T]), T // 16 of them; none under the salt ``NOT_KEPT``."""
        if salt == NOT_KEPT:
            return []
        data = tokens.astype("<i4", copy=False).tobytes()
        digest, chain, size = self._root(tenant, salt), [], _DIGEST_BYTES
        for end in range(_BLOCK_BYTES, len(data) + 1, _BLOCK_BYTES):
            digest = blake2b(digest + data[end - _BLOCK_BYTES : end], digest_size=size).digest()
            chain.append(digest)
        return chain


def _root(*names: str) -> Digest:
    """Names with their lengths in front, so that no two lists of names run together."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    framed = b"".join(len(name).to_bytes(8, "little") + name for name in encoded)
    return blake2b(framed, digest_size=_DIGEST_BYTES, person=b"moe-prefill kv 1").digest()


def held_blocks(chain: Chain, limit: int, table: Container[Digest], other: Container[Digest] = ()) -> int:
    """How many leading blocks of ``chain``, at most ``limit``, are in ``table`` or ``other``; together they hold with
    every block all those before it.
    """
    low, high = 0, min(limit, len(chain))
    if high and chain[0] not in table and chain[0] not in other:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        digest = chain[middle - 1]
        if digest in table or digest in other:
            low = middle
        else:
            high = middle - 1
    return low


def common_blocks(a: Chain, b: Chain) -> int:
    """How many leading blocks two requests share: a digest names all blocks before it."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[middle - 1] == b[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
