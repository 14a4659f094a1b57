"""What a sweep holds in memory, and how large a sweep fits into given bytes. Torch-free.

Live during a sweep: the residual, its norm, K and V of one layer and the rope tables for every token; one chunk's
activations; one block of LM head logits. Weights, banks and the pool of prefixes are counted elsewhere (``residency``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .blocks import BLOCK_TOKENS
from .core import EngineLimits, ModelSpec
from .errors import PlanError

GIB = 1 << 30
FRAGMENTS = 10  # a tenth of a sweep's bytes is lost between the allocator's blocks
DeviceKind = Literal["cuda", "cpu"]
_CHUNK_ROWS = {"cuda": 16384, "cpu": 8192}
_MOST_CHUNK_ROWS = {"cuda": 65536, "cpu": 8192}  # where memory is left
_LEAST_CHUNK_ROWS = 256
_LOGITS_SHARE, _MOST_LOGITS_ROWS = 16, 1024  # a 16th of a chunk's rows go through the LM head at a time
_GATHERED_KEYS = 2  # a chunk's, for one of its rows

# A sweep of this many tokens is on the plateau, so memory beyond it is better spent on banks; and one that finds room
# grows to the second number, for longer requests.
_ENOUGH_TOKENS = {"cuda": 65536, "cpu": 16384}
_MOST_TOKENS = {"cuda": 131072, "cpu": 16384}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes of a sweep in tokens or rows; ``bytes_by_purpose`` explains the total."""

    max_sweep_tokens: int
    chunk_rows: int
    max_gathered_keys: int
    logits_block_bytes: int
    bytes_by_purpose: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes_by_purpose.values())

    def limits(self, spec: ModelSpec) -> EngineLimits:
        longest = min(spec.max_positions, self.max_sweep_tokens)
        return EngineLimits(
            max_request_tokens=longest,
            max_sweep_tokens=self.max_sweep_tokens,
            vocab_size=spec.vocab_size,
            chunk_rows=self.chunk_rows,
        )


def memory_plan(spec: ModelSpec, element: int, tokens: int, chunk_rows: int) -> MemoryPlan:
    """The plan of a sweep of ``tokens`` tokens, ``chunk_rows`` rows of a layer at a time; ``element``: bytes of an
    activation.
    """
    key = key_bytes(spec, element)
    rows = min(tokens, chunk_rows)
    logits = max(1, min(chunk_rows // _LOGITS_SHARE, _MOST_LOGITS_ROWS)) * 4 * spec.vocab_size
    return MemoryPlan(
        max_sweep_tokens=tokens,
        chunk_rows=chunk_rows,
        max_gathered_keys=_GATHERED_KEYS * chunk_rows,
        logits_block_bytes=logits,
        bytes_by_purpose={
            "residual and positions": tokens * (token_bytes(spec, element) - key),
            "keys and values": tokens * key,
            "gathered keys and values": tokens * key,  # a request's own may all be gathered once
            "chunk activations": rows * (chunk_row_bytes(spec, element) + _GATHERED_KEYS * key),
            "logits block": 2 * logits,  # the log-sum-exp needs a second one
        },
    )


def largest_sweep(spec: ModelSpec, element: int, budget: int, chunk_rows: int) -> int:
    """The most tokens whose sweep fits into ``budget`` bytes; 0 when not even one does."""

    def size(tokens: int) -> int:
        return memory_plan(spec, element, tokens, chunk_rows).num_bytes

    per_token = size(chunk_rows + 1) - size(chunk_rows)
    if budget >= size(chunk_rows):
        return chunk_rows + (budget - size(chunk_rows)) // per_token
    return max(0, (budget - size(0)) // (size(1) - size(0)))


def sweep_sizes(
    kind: DeviceKind, wanted: int | None, chunk_rows: int | None, usual_rows: int | None = None
) -> list[tuple[int, int]]:
    """Sizes of a sweep to try, (tokens, chunk rows), from enough down to the least. What is given is kept;
    ``usual_rows`` are only where chunks begin.
    """
    chunk = usual_rows or _CHUNK_ROWS[kind]
    sizes = [(wanted or tokens, chunk_rows or rows) for tokens, rows in _halvings(kind, chunk)]
    return list(dict.fromkeys(sizes))


def enough_tokens(kind: DeviceKind) -> int:
    """The least sweep that computes at the full rate."""
    return _ENOUGH_TOKENS[kind]


def sweep_steps(kind: DeviceKind) -> list[int]:
    """Sizes of a sweep in tokens among which a predicted speed decides: from enough upwards, the third one usual."""
    return [_ENOUGH_TOKENS[kind] * count // 2 for count in (2, 3, 4, 6, 8, 12, 16)]


def is_good(
    kind: DeviceKind, size: tuple[int, int], wanted: int | None, chunk_rows: int | None, usual_rows: int | None = None
) -> bool:
    """Whether a sweep of this size computes at nearly the full rate, as long as no bank has to be waited for."""
    tokens, rows = size
    least = (usual_rows or _CHUNK_ROWS[kind]) // 4
    return (wanted is not None or tokens >= least) and (chunk_rows is not None or rows >= min(least, tokens))


def grown(kind: DeviceKind, tokens: int, room: int) -> int:
    """A sweep of ``tokens`` that finds room for ``room``: larger, up to the most that brings anything, by whole
    blocks.
    """
    most = min(room, _MOST_TOKENS[kind])
    return max(tokens, most // 256 * 256)


def larger_chunks(kind: DeviceKind, tokens: int, rows: int) -> Iterator[int]:
    """Twice as many rows and so on, for a sweep of ``tokens`` that has chunks of the usual ``rows`` already: fewer and
    larger products, worth only memory that nothing else wants.
    """
    while rows >= _CHUNK_ROWS[kind] and 2 * rows <= min(_MOST_CHUNK_ROWS[kind], tokens):
        rows *= 2
        yield rows


def plan_memory(
    spec: ModelSpec,
    *,
    kind: DeviceKind,
    element: int,
    budget: int,
    wanted: int | None = None,
    chunk_rows: int | None = None,
) -> MemoryPlan:
    """The best sweep in ``budget`` bytes, which are all that is there beside weights and banks. PlanError, with the
    numbers, when not even one token fits or ``wanted`` does not.
    """
    for tokens, rows in sweep_sizes(kind, wanted, chunk_rows):
        room = largest_sweep(spec, element, budget, rows)
        if room >= tokens:
            return memory_plan(spec, element, wanted or grown(kind, tokens, room), rows)
    least = sweep_sizes(kind, wanted, chunk_rows)[-1]
    raise PlanError(
        f"a sweep of {least[0]:,} tokens needs {show_bytes(memory_plan(spec, element, *least).num_bytes)} beside the "
        f"weights, and there are {show_bytes(max(budget, 0))}; give more memory or a smaller --max-sweep-tokens"
    )


def workspace_reserve(device_bytes: int) -> int:
    """Bytes of a device that are left to the workspaces of kernels and collectives: 1 GiB, a sixteenth where there is
    little.
    """
    return min(GIB, device_bytes // 16)


def show_bytes(size: int) -> str:
    """A size for people: GiB, or MiB, or KiB where the larger unit would show nothing."""
    if size >= GIB // 10:
        return f"{size / GIB:,.2f} GiB"
    return f"{size / (1 << 20):,.1f} MiB" if size >= 1 << 17 or size == 0 else f"{size / (1 << 10):,.1f} KiB"


def key_bytes(spec: ModelSpec, element: int) -> int:
    """Bytes of one token's K and V in one layer."""
    return 2 * spec.num_kv_heads * spec.head_dim * element


def kv_block_bytes(spec: ModelSpec, element: int) -> int:
    """Bytes of K and V of 16 tokens in all layers: a block of the pool that keeps prefixes."""
    return BLOCK_TOKENS * spec.num_layers * key_bytes(spec, element)


def token_bytes(spec: ModelSpec, element: int) -> int:
    """Bytes that every token of a sweep holds: the residual and its norm (less where that is float8), K, V, rope
    tables, ids and positions.
    """
    return element * (2 * spec.hidden_size + spec.rope.dim) + key_bytes(spec, element) + 16


def chunk_row_bytes(spec: ModelSpec, element: int) -> int:
    """Bytes that a row of a chunk holds at the worst moment of a layer: in attention or among the experts.

    Gathered rows, gate and up, hidden and output rows are never all alive, which leaves room for the float8 copies of
    the first and third.
    """
    q_width, d_model = spec.num_heads * spec.head_dim, spec.hidden_size
    attention = element * (2 * d_model + 2 * q_width) + 4 * q_width * 2
    rows = spec.top_k if spec.num_sparse_layers else 0
    sparse = element * rows * (2 * d_model + 3 * spec.expert_size) + 24 * rows + 8 * spec.num_experts
    dense = 3 * element * max(spec.dense_size, spec.shared_size)
    return max(attention, element * 3 * d_model + sparse + dense)


def _halvings(kind: DeviceKind, chunk: int) -> Iterator[tuple[int, int]]:
    """Smaller chunks first, which cost little; then smaller sweeps."""
    tokens = _ENOUGH_TOKENS[kind]
    yield from ((tokens, chunk), (tokens, chunk // 2))
    while tokens:
        yield tokens, max(_LEAST_CHUNK_ROWS, min(chunk // 4, tokens // 4))
        tokens //= 2
