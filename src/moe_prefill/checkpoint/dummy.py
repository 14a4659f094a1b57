"""Random weights of any shape, without files: N(0, 0.02) from a slot's name and a seed, norms 1.

Every slot is cut into pieces (an expert of a bank, a block of rows elsewhere), each with a generator of its own seeded
from the slot's name, the piece's number and the seed. So values depend neither on the order of slots, nor on how many
ranks share them, nor on the dtype (drawn in float32, then rounded). They do depend on the kind of ``device`` that draws
them, because CPU and CUDA generators differ: draw on one kind to compare.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch

from ..errors import UsageError
from .slots import Allocate, Keep, Shape, allocated, kept_ranges

STD = 0.02
BLOCK_ROWS = 8192  # rows a piece of a matrix; part of the format, since it decides which generator draws a value
MOST_LOADED = 0.42  # of all tokens; an expert with a zero-mean score cannot reach half
TRIALS, CORRECTIONS = 32768, 6


def dummy_slots(
    shapes: Mapping[str, Shape],
    allocate: Allocate,
    *,
    seed: int = 0,
    skew: float = 1.0,
    top_k: int = 1,
    device: torch.device | str = "cpu",
    keep: Keep | None = None,
) -> dict[str, torch.Tensor]:
    """Fill every slot of ``shapes`` with random values drawn on ``device``, one piece of float32 there at a time.

    ``skew`` is the ratio between the most and the least loaded expert of each layer, for inputs without a preferred
    direction, and ``top_k`` the experts a token takes; experts keep their rank within a layer and differ from layer to
    layer. UsageError: a skew that these experts cannot have.
    """
    slots = {}
    for slot, part in kept_ranges(shapes, keep).items():
        target = slots[slot] = allocated(slot, shapes[slot], part, allocate)
        if _leaf(slot).endswith("norm"):
            target.fill_(1.0)
            continue
        is_skewed = skew != 1.0 and _leaf(slot) == "router"
        scale = _dealt_scales(slot, shapes[slot][0], top_k, skew, seed) if is_skewed else None
        for first, values in _pieces(slot, shapes[slot], part, seed, torch.device(device)):
            if scale is not None:
                values *= scale[first : first + len(values), None].to(values.device)
            target[first - part.start : first - part.start + len(values)].copy_(values)
    return slots


def _leaf(slot: str) -> str:
    return slot.rpartition(".")[2]


def _pieces(
    slot: str, shape: Shape, part: range, seed: int, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """The pieces of a slot that ``part`` touches, cut to it: first row and float32 values."""
    step = 1 if len(shape) == 3 else BLOCK_ROWS
    generator = torch.Generator(device)
    for number in range(part.start // step, -(-part.stop // step)):
        rows = range(number * step, min((number + 1) * step, shape[0]))
        generator.manual_seed(_piece_seed(slot, number, seed))
        values = torch.empty(len(rows), *shape[1:], device=device).normal_(0.0, STD, generator=generator)
        first, last = max(rows.start, part.start), min(rows.stop, part.stop)
        yield first, values[first - rows.start : last - rows.start]


def _piece_seed(slot: str, number: int, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{slot}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _dealt_scales(slot: str, num_experts: int, top_k: int, skew: float, seed: int) -> torch.Tensor:
    """The same factors in every layer, dealt to its experts in another order."""
    generator = torch.Generator().manual_seed(_piece_seed(f"{slot}.order", 0, seed))
    return router_scales(num_experts, top_k, skew)[torch.randperm(num_experts, generator=generator)]


@functools.cache
def router_scales(num_experts: int, top_k: int, skew: float) -> torch.Tensor:
    """Factors [E] on the router's rows that spread the experts' loads over a ratio of ``skew``, root mean square 1.

    On inputs without a preferred direction an expert's score is normal with zero mean, and a larger row makes a wider
    one. A token takes the experts whose score is above its k-th largest score, nearly the same for all tokens: an
    expert whose score is s thresholds wide is taken with probability Q(1 / s). That gives first widths; with few
    experts the threshold does vary, so the widths are then corrected against the loads of ``TRIALS`` drawn tokens.
    """
    wanted = _loads(num_experts, top_k, skew)
    generator = torch.Generator().manual_seed(0)
    scores = torch.empty(TRIALS, num_experts).normal_(generator=generator)
    widths = 1.0 / _threshold(wanted)
    for _ in range(CORRECTIONS):
        widths *= _threshold(_taken(scores, widths, top_k).clamp(max=0.49)) / _threshold(wanted)
        widths /= widths.square().mean().sqrt()
    loads = _taken(scores, widths, top_k)
    if not 0.75 * skew < loads[-1] / loads[0] < 1.33 * skew:
        raise UsageError(
            f"dummy skew {skew:g} is out of reach with {top_k} of {num_experts} experts a token: rows of different "
            f"sizes reach {loads[-1] / loads[0]:.1f}. Ask for less."
        )
    return widths.float()


def _taken(scores: torch.Tensor, widths: torch.Tensor, top_k: int) -> torch.Tensor:
    """How often each expert is among the ``top_k`` of a token, [E]."""
    taken = (scores * widths.float()).topk(top_k).indices.flatten()
    return torch.bincount(taken, minlength=len(widths)).clamp(min=1).double() / len(scores)


def _threshold(loads: torch.Tensor) -> torch.Tensor:
    """How many standard deviations a score must reach to be taken this often."""
    negative: torch.Tensor = torch.special.ndtri(loads)
    return -negative


def _loads(num_experts: int, top_k: int, skew: float) -> torch.Tensor:
    """Probabilities [E] that a token takes an expert: ascending, ratio ``skew`` from first to last, sum ``top_k``.

    They are geometric where that keeps the largest below ``MOST_LOADED``, otherwise bent until it does.
    """
    mean = top_k / num_experts
    if not 1.0 < skew < math.inf or num_experts < 2 or not mean < MOST_LOADED:
        raise UsageError(
            f"dummy skew {skew:g} with {top_k} of {num_experts} experts a token: the skew must be at least 1, and a "
            f"token may take at most {MOST_LOADED:.0%} of the experts."
        )
    steps = torch.linspace(0, 1, num_experts, dtype=torch.float64)
    geometric = skew**steps
    geometric *= mean / geometric.mean()
    if geometric[-1] <= MOST_LOADED:
        return geometric
    least = MOST_LOADED / skew

    def bent(power: float) -> torch.Tensor:
        return least + (MOST_LOADED - least) * steps**power

    return bent(_solve(lambda power: float(bent(power).mean()) - mean))


def _solve(falling: Callable[[float], float]) -> float:
    """The positive root of a falling function, by bisection on a logarithmic scale."""
    low, high = 1e-6, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return high
