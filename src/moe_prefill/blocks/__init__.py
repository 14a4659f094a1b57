"""Blocks of 16 tokens: their hashes, the bookkeeping of a worker's pool of them, and the events that tell the router
what the pool holds. Torch-free; shared by the frontend and the workers.
"""

from .events import BlockChange, BlockEvents
from .hashes import BLOCK_TOKENS, BlockHasher, Chain, Digest, common_blocks, held_blocks
from .pool import BlockPool, kept_blocks
from .sweep import HashedSweep, sibling_blocks, usable_blocks

__all__ = [
    "BLOCK_TOKENS",
    "BlockChange",
    "BlockEvents",
    "BlockHasher",
    "BlockPool",
    "Chain",
    "Digest",
    "HashedSweep",
    "common_blocks",
    "held_blocks",
    "kept_blocks",
    "sibling_blocks",
    "usable_blocks",
]
