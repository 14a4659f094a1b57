"""What one rank of a baseline holds, in bytes by purpose, and how large its sweeps can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import PlanError
from ..memory import (
    FRAGMENTS,
    DeviceKind,
    MemoryPlan,
    chunk_row_bytes,
    memory_plan,
    show_bytes,
    sweep_sizes,
    workspace_reserve,
)
from ..residency import DTYPE_BYTES, expert_record
from ..shapes import Shape, float8_slots, slot_shapes
from .share import Share

_MOST_TOKENS = 1 << 36


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareMemory:
    """``device_bytes`` explains the total by purpose; a sweep of ``largest_sweep_tokens`` would fit with the smallest
    chunks.
    """

    sweep: MemoryPlan
    device_bytes: Mapping[str, int]
    largest_sweep_tokens: int


def fit_share(
    share: Share,
    kind: DeviceKind,
    device_bytes: int,
    *,
    dtype: str,
    bank_dtype: str,
    wanted: int | None = None,
    chunk_rows: int | None = None,
) -> ShareMemory:
    """Sweep and chunk sizes for ``device_bytes``, which are all that the rank may use. ``chunk_rows`` are rows whose
    experts are computed together: under dp+tp those of all ranks, so each brings its part of them. PlanError, with the
    numbers, when nothing fits.
    """
    element, weights = DTYPE_BYTES[dtype], share_weights(share, dtype, bank_dtype)

    def sizes(tokens: int, rows: int) -> dict[str, int]:
        sweep = memory_plan(share.spec, element, tokens, rows).bytes_by_purpose
        moved = transfer_bytes(share, element, tokens, rows)
        reserve = workspace_reserve(device_bytes) + (sum(sweep.values()) + moved) // FRAGMENTS
        return {**weights, **sweep, "sent and received": moved, "workspace reserve": reserve}

    def fits(tokens: int, rows: int) -> bool:
        return sum(sizes(tokens, rows).values()) <= device_bytes

    tries = [(tokens, _rows_of_rank(share, rows)) for tokens, rows in sweep_sizes(kind, wanted, chunk_rows)]
    found, least = next((size for size in tries if fits(*size)), None), tries[-1]
    largest = _most(lambda tokens: fits(tokens, least[1]))
    if found is None:
        raise _refusal(share, sizes(*least), least[0], device_bytes, largest)
    return ShareMemory(
        sweep=memory_plan(share.spec, element, *found),
        device_bytes=sizes(*found),
        largest_sweep_tokens=largest,
    )


def share_weights(share: Share, dtype: str, bank_dtype: str) -> dict[str, int]:
    """Bytes of what the rank keeps of the model, by purpose."""
    shapes = {slot: shape for slot, shape in slot_shapes(share.whole).items() if share.holds(slot)}
    parts = {slot: share.kept_shape(slot, shape) for slot, shape in shapes.items()}
    kept = {slot: math.prod(part) * DTYPE_BYTES[dtype] for slot, part in parts.items()}
    if DTYPE_BYTES[bank_dtype] == 1:
        kept |= {slot: math.prod(parts[slot]) + 4 * parts[slot][0] for slot in share_float8_slots(share, shapes)}
    ends = sum(size for slot, size in kept.items() if slot in ("embed", "lm_head"))
    sparse = sum(share.whole.layers[layer].sparse for layer in share.layers)
    return {
        "embedding and head": ends,
        "attention, routers, dense": sum(kept.values()) - ends,
        "experts": sparse * len(share.experts) * expert_record(share.spec, bank_dtype).num_bytes,
    }


def share_float8_slots(share: Share, shapes: Mapping[str, Shape]) -> set[str]:
    """Which of these slots the rank keeps in float8: its parts are what the products must take."""
    return float8_slots({slot: share.kept_shape(slot, shape) for slot, shape in shapes.items()})


def transfer_bytes(share: Share, element: int, tokens: int, chunk_rows: int, ranks_a_row: float | None = None) -> int:
    """Bytes for what is sent and received, beside what the plain engine holds.

    Under dp+ep every row goes to ``ranks_a_row`` ranks, and as many rows of each rank's chunk arrive here. None: the
    worst case, every row has experts on every rank, and all of them arrive at this one.
    """
    row, size, top_k = share.whole.hidden_size * element, share.size, share.whole.top_k
    if share.name == "pp+pp":
        return 2 * tokens * row  # one residual is arriving while another leaves
    if share.name == "dp+ep":
        sent, arriving = (min(size, top_k), size) if ranks_a_row is None else (ranks_a_row, ranks_a_row)
        pair = top_k * (2 * share.whole.hidden_size + 3 * share.spec.expert_size) * element
        return int(chunk_rows * (2 * sent * row + 3 * arriving * row + (sent + arriving) * 8 * top_k + pair))
    if share.name == "dp+tp":
        gathered = size * (3 * row + 8 * top_k) + (size - 1) * chunk_row_bytes(share.spec, element)
        return chunk_rows * gathered
    return 2 * chunk_rows * row


def mean_ranks_a_row(share: Share) -> float:
    """How many ranks hold at least one of a row's experts, when experts are chosen evenly and without preference."""
    experts, top_k = share.whole.num_experts, share.whole.top_k
    elsewhere = math.comb(experts - experts // share.size, top_k) / math.comb(experts, top_k)
    return share.size * (1 - elsewhere)


def _rows_of_rank(share: Share, rows: int) -> int:
    return max(1, rows // share.size) if share.name == "dp+tp" else rows


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number for which a condition holds that holds for all smaller ones; 0: for none."""
    low, high = 0, _MOST_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _refusal(share: Share, sizes: Mapping[str, int], tokens: int, there: int, largest: int) -> PlanError:
    lines = [f"  {name}: {show_bytes(size)}" for name, size in sizes.items() if size]
    most = f"the largest sweep that fits has {largest:,} tokens" if largest else "no sweep fits, however small"
    return PlanError(
        f"the model does not fit under {share.name} on {share.size} ranks: with a sweep of {tokens:,} tokens, rank "
        f"{share.rank} needs {show_bytes(sum(sizes.values()))} and there are {show_bytes(there)}\n"
        + "\n".join(lines)
        + f"\n{most}; give more memory, more ranks, or a smaller --max-sweep-tokens"
    )
