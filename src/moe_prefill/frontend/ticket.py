"""One request on its way through the frontend."""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks import BlockHasher, Digest, usable_blocks
from ..core import AtomicRequest


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Ticket:
    """A request with what routing needs to know of it.

    ``chain``: digests of its whole blocks. ``usable_blocks``: how many of them stored K and V may replace; a hit ends
    before the first asked position and before the last token, whose hidden states have to be computed. ``asked`` rows
    from position ``first_asked`` on are carried through the last layer; the head reads ``head_rows`` rows. Only
    requests of one ``share_key`` share anything.
    """

    id: int
    request: AtomicRequest
    chain: tuple[Digest, ...]
    num_tokens: int
    first_asked: int
    asked: int
    head_rows: int
    usable_blocks: int
    share_key: str
    arrival_s: float = 0.0


def make_ticket(
    request: AtomicRequest,
    hasher: BlockHasher,
    *,
    id: int,
    vocab_size: int,
    tenant: str = "",
    private: bool = False,
    arrival_s: float = 0.0,
) -> Ticket:
    """Hash a request. ``private``: it shares with nobody (under dynamic rope, beyond the original context)."""
    num_tokens, asked = len(request.tokens), len(request.positions)
    first = int(request.positions[0])
    return Ticket(
        id=id,
        request=request,
        chain=() if private else tuple(hasher.chain(request.tokens, tenant=tenant, salt=request.salt)),
        num_tokens=num_tokens,
        first_asked=first,
        asked=asked,
        head_rows=asked * vocab_size if request.vocabulary else len(request.ids),
        usable_blocks=usable_blocks(request),
        share_key=f"{tenant}\0{request.salt}" + (f"\0{id}" if private else ""),
        arrival_s=arrival_s,
    )
