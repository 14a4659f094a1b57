"""Mixtral's published names: ``block_sparse_moe`` for the block, ``w1``, ``w3``, ``w2`` for gate, up, down.

transformers 5 can also save the common names, fused or not, so a name that is already right is left alone.
"""

from __future__ import annotations

import re

_TO_COMMON = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_PROJECTION = re.compile(r"(?<=\.)(w1|w2|w3)(?=\.weight$)")


def spelling(name: str) -> str:
    """The name in the spelling that the families share."""
    return _PROJECTION.sub(lambda met: _TO_COMMON[met[0]], name.replace(".block_sparse_moe.", ".mlp."))
