"""The residency plan: from a model and the memory of a rank to the level of every layer, the buffers that streams need
and the size of a sweep.

The rule. Banks get the best level that fits (resident before sharded before hybrid or offloaded) beside a sweep that
is large enough; streamed layers are spread over depth. How large is enough: what the user asks for; else, where a
speed is known, the size whose levels are predicted to give the most tokens/s; else 65,536 tokens (16,384 on a CPU), or
down to a quarter, with chunks of a quarter, where all banks so become resident, or need no host, or fit at all. Where
no such sweep fits, the same order goes through smaller ones. A sweep grows into memory that no further bank can use,
and then its chunks do. Where banks stream anyway and sweeps can be predicted, resident ones make room for larger chunks
that gain more than streaming their banks costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core import Level, ModelSpec
from ..costmodel import SweepPrediction
from ..errors import PlanError, UsageError
from ..memory import (
    FRAGMENTS,
    GIB,
    grown,
    is_good,
    kv_block_bytes,
    larger_chunks,
    largest_sweep,
    memory_plan,
    show_bytes,
    sweep_sizes,
    sweep_steps,
    workspace_reserve,
)
from ..shapes import float8_slots, slot_shapes
from .levels import (
    Levels,
    bank_buffers,
    levels_of,
    num_streamed,
    parse_residency,
    prefetch_depth,
    staged_shards,
)
from .plan import Budget, Pins, ResidencyPlan, Speed
from .record import DTYPE_BYTES, bank_bytes, block_scale_bytes, shard_bytes
from .remedies import MOST_EXPOSED, Predict, exposed_share, remedies

UNBOUNDED = 1 << 60  # bytes of host memory where no limit is given
# Of host memory beside pinned banks, for the process and its tables; a sixteenth where there is little.
_HOST_RESERVE = 8 * GIB
_SAME_SPEED = 0.995
_WORTH_BANKS = 1.01  # so much faster must larger chunks be: what streaming takes of the memory's time is not predicted


def plan_residency(
    spec: ModelSpec,
    budget: Budget,
    *,
    dtype: str,
    bank_dtype: str,
    pins: Pins | None = None,
    speed: Speed | None = None,
    predict: Predict | None = None,
) -> ResidencyPlan:
    """The plan of every rank. ``dtype`` and ``bank_dtype`` are names in ``DTYPE_BYTES``. ``speed`` decides between
    banks and tokens, ``predict`` whether a remedy against exposed banks is worth its memory.

    UsageError: pins that contradict the model or the number of ranks. PlanError: it does not fit, with the bytes by
    purpose, what is missing, and the largest sweep that would fit.
    """
    planner = _Planner(spec, budget, dtype, bank_dtype, pins or Pins(), predict)
    return planner.fastest(speed) if speed is not None and planner.free_to_choose else planner.by_rule()


@dataclass(frozen=True, slots=True)
class _Candidate:
    levels: Levels
    tokens: int
    chunk_rows: int
    depth: int | None = None  # of the prefetch; None: as usual for the levels

    @property
    def buffers(self) -> int:
        return bank_buffers(self.levels, self.depth)


class _Planner:
    """Enumerates candidates and keeps those that fit."""

    def __init__(
        self,
        spec: ModelSpec,
        budget: Budget,
        dtype: str,
        bank_dtype: str,
        pins: Pins,
        predict: Predict | None = None,
    ) -> None:
        if pins.prefetch_depth is not None and pins.prefetch_depth < 1:
            raise UsageError(f"--prefetch-depth is {pins.prefetch_depth}; it must be at least 1")
        self.spec, self.budget, self.pins, self.predict = spec, budget, pins, predict
        self.dtype, self.bank_dtype, self.element = dtype, bank_dtype, DTYPE_BYTES[dtype]
        self.bank, self.shard = bank_bytes(spec, bank_dtype), shard_bytes(spec, bank_dtype, budget.ranks)
        self.weights = weight_bytes(spec, self.element, float8=DTYPE_BYTES[bank_dtype] == 1)
        self.prefixes = pins.kv_blocks * kv_block_bytes(spec, self.element)
        self.pinned = parse_residency(pins.residency or "auto", spec, budget.ranks)
        self.sizes = sweep_sizes(budget.kind, pins.max_sweep_tokens, pins.chunk_rows, pins.usual_chunk_rows)

    @property
    def free_to_choose(self) -> bool:
        return self.pins.max_sweep_tokens is None

    def by_rule(self) -> ResidencyPlan:
        """The first that fits, beside a good sweep if possible: everything resident, then everything in the devices'
        memory, then any levels.
        """
        found = next(filter(None, self._tries()), None)
        if found is None:
            raise self._refusal()
        return self._plan(found)

    def fastest(self, speed: Speed) -> ResidencyPlan:
        """The candidate of the highest predicted tokens/s; where that hardly differs, fewer streamed layers, then
        larger chunks, then sweeps of usual size. Sweeps too small to be among the steps go by the rule.
        """
        rows = list(dict.fromkeys(chunk for _, chunk in self.sizes[:3]))
        steps = sweep_steps(self.budget.kind)
        found = [self._best_levels((tokens, chunk)) for tokens in steps for chunk in rows]
        rated = [(speed(each.levels, each.tokens, each.chunk_rows), each) for each in found if each is not None]
        if not rated:
            return self.by_rule()
        least = _SAME_SPEED * max(rate for rate, _ in rated)
        best = max(
            (each for rate, each in rated if rate >= least),
            key=lambda each: (-num_streamed(each.levels), each.chunk_rows, -abs(each.tokens - steps[2])),
        )
        return self._plan(best, grow=False)

    def _tries(self) -> Iterator[_Candidate | None]:
        pins = self.pins
        if self.pinned is not None:
            yield from map(self._best_levels, self.sizes)
            return
        sizes = (pins.max_sweep_tokens, pins.chunk_rows, pins.usual_chunk_rows)
        good = [size for size in self.sizes if is_good(self.budget.kind, size, *sizes)]
        for allowed in (good, self.sizes):
            for counts in self._stages():
                yield from (self._first(counts, size) for size in allowed)

    def _best_levels(self, size: tuple[int, int]) -> _Candidate | None:
        """The best levels that fit beside a sweep of this size, or None."""
        if self.pinned is not None:
            return self._fitting(self._at(self.pinned, size))
        return self._first(self._stages()[-1], size)

    def _first(self, counts: Sequence[Mapping[Level, int]], size: tuple[int, int]) -> _Candidate | None:
        return next((c for each in counts if (c := self._fitting(self._candidate(each, size)))), None)

    def _stages(self) -> list[list[dict[Level, int]]]:
        """Counts of levels, from best to worst: only resident ones, those without the host, all."""
        total = self.spec.num_sparse_layers

        def fewer(best: Level, worse: Level) -> list[dict[Level, int]]:
            return [{best: here, worse: total - here} for here in range(total - 1, -1, -1)]

        resident: list[dict[Level, int]] = [{"resident": total}]
        if self.budget.ranks == 1:
            return [resident, resident + fewer("resident", "offloaded")]
        devices = resident + fewer("resident", "sharded")
        return [resident, devices, devices + fewer("sharded", "hybrid")]

    def _candidate(self, counts: Mapping[Level, int], size: tuple[int, int]) -> _Candidate:
        return self._at(levels_of(self.spec, counts), size)

    def _at(self, levels: Levels, size: tuple[int, int]) -> _Candidate:
        return _Candidate(levels, *size, self.pins.prefetch_depth)

    def _fitting(self, candidate: _Candidate) -> _Candidate | None:
        device, host = self._device_bytes(candidate), self._host_bytes(candidate.levels)
        fits = sum(device.values()) <= self.budget.device_bytes and sum(host.values()) <= self.budget.host_bytes
        return candidate if fits else None

    def _device_bytes(self, candidate: _Candidate) -> dict[str, int]:
        """Bytes of one rank by purpose."""
        sweep = memory_plan(self.spec, self.element, candidate.tokens, candidate.chunk_rows)
        return {
            **self.weights,
            **self._banks(candidate),
            "prefix keys and values": self.prefixes,
            **sweep.bytes_by_purpose,
            "workspace reserve": workspace_reserve(self.budget.device_bytes) + sweep.num_bytes // FRAGMENTS,
        }

    def _banks(self, candidate: _Candidate) -> dict[str, int]:
        levels = candidate.levels
        return {
            "resident banks": levels.count("resident") * self.bank,
            "shards": levels.count("sharded") * self.shard,
            "bank buffers": candidate.buffers * self.bank,
            "staged shards": staged_shards(levels, candidate.depth) * self.shard,
        }

    def _host_bytes(self, levels: Levels) -> dict[str, int]:
        """Pinned bytes of one rank, and what its process needs beside them; nothing where nothing is pinned."""
        pinned = levels.count("offloaded") * self.bank + levels.count("hybrid") * self.shard
        reserve = min(_HOST_RESERVE // self.budget.ranks, self.budget.host_bytes // 16) if pinned else 0
        return {"pinned banks": pinned, "process reserve": reserve}

    def _room(self, candidate: _Candidate) -> int:
        """The most tokens whose sweep fits beside the candidate's levels, with its chunks."""
        fixed = sum(self.weights.values()) + sum(self._banks(candidate).values()) + self.prefixes
        fixed += workspace_reserve(self.budget.device_bytes)
        left = (self.budget.device_bytes - fixed) * FRAGMENTS // (FRAGMENTS + 1)
        return largest_sweep(self.spec, self.element, left, candidate.chunk_rows)

    def _leanest(self, size: tuple[int, int]) -> _Candidate:
        """The levels of the least device memory that the host has room for, with a sweep of this size."""
        if self.pinned is not None:
            return self._at(self.pinned, size)
        fitting = [self._candidate(counts, size) for counts in self._stages()[-1]]
        fitting = [c for c in fitting if sum(self._host_bytes(c.levels).values()) <= self.budget.host_bytes]
        return min(fitting, key=lambda c: sum(self._banks(c).values()))

    def _with_larger_chunks(self, candidate: _Candidate) -> _Candidate:
        """The candidate with the largest chunks that fit beside all that it has."""
        if self.pins.chunk_rows is None:
            for rows in larger_chunks(self.budget.kind, candidate.tokens, candidate.chunk_rows):
                candidate = self._fitting(replace(candidate, chunk_rows=rows)) or candidate
        return candidate

    def _finished(self, candidate: _Candidate, grow: bool) -> _Candidate:
        """The candidate with a sweep, then chunks, that take what memory is left."""
        if grow and self.free_to_choose:
            candidate = replace(candidate, tokens=grown(self.budget.kind, candidate.tokens, self._room(candidate)))
        return self._with_larger_chunks(candidate)

    def _with_chunks_for_banks(self, chosen: _Candidate, grow: bool) -> _Candidate:
        """The chosen plan, or one of fewer resident banks and larger chunks that is predicted to be faster."""
        plain = best = self._finished(chosen, grow)
        fixed = self.pinned is not None or self.pins.chunk_rows is not None
        if self.predict is None or fixed or not num_streamed(plain.levels):
            return chosen
        for rows in larger_chunks(self.budget.kind, plain.tokens, plain.chunk_rows):
            each = self._best_levels((plain.tokens, rows))
            if each is not None and self._rate(each) >= _WORTH_BANKS * self._rate(best):
                best = each
        return chosen if best is plain else best

    def _remedied(self, chosen: _Candidate, grow: bool) -> tuple[_Candidate, str | None]:
        """The chosen plan, or what hides its banks by the remedy of the least memory, where the sweep is predicted to
        wait too long; and why. It shortens no request.
        """
        plain = self._finished(chosen, grow)
        if self.predict is None or not num_streamed(plain.levels):
            return plain, None
        before = self._forecast(plain)
        if exposed_share(before) <= MOST_EXPOSED:
            return plain, None
        tried = remedies(self.spec, plain.levels, plain.depth, pinned=self.pinned is not None)
        changed = [(remedy.name, replace(plain, levels=remedy.levels, depth=remedy.depth)) for remedy in tried]
        for name, each in sorted(changed, key=lambda change: self._cost(change[1])):
            fitting = [self._finished(sized, grow) for sized in self._sizes_for(each, chosen)]
            found = [(sized, self._forecast(sized)) for sized in fitting]
            hidden = [
                (sized, sweep)
                for sized, sweep in found
                if exposed_share(sweep) <= MOST_EXPOSED and self._longest(sized) == self._longest(plain)
            ]
            best, after = max(hidden, key=lambda each: each[0].tokens / each[1].sweep_s, default=(plain, before))
            if best is not plain and best.tokens / after.sweep_s >= plain.tokens / before.sweep_s:
                return best, (
                    f"{name}: {exposed_share(after):.1%} of a sweep of {best.tokens:,} tokens is predicted to wait for "
                    f"banks; without it {exposed_share(before):.1%} of one of {plain.tokens:,}"
                )
        return plain, None

    def _longest(self, candidate: _Candidate) -> int:
        """Tokens of the longest request."""
        return min(self.spec.max_positions, candidate.tokens)

    def _forecast(self, candidate: _Candidate) -> SweepPrediction:
        assert self.predict is not None
        return self.predict(candidate.levels, candidate.tokens, candidate.chunk_rows, candidate.buffers)

    def _rate(self, candidate: _Candidate) -> float:
        """Predicted tokens/s."""
        return candidate.tokens / self._forecast(candidate).sweep_s

    def _cost(self, candidate: _Candidate) -> tuple[int, int]:
        """Bytes of the banks: on the device, then on the host."""
        return sum(self._banks(candidate).values()), sum(self._host_bytes(candidate.levels).values())

    def _sizes_for(self, candidate: _Candidate, chosen: _Candidate) -> Iterator[_Candidate]:
        """The candidate with the chosen sweep, smaller chunks, or the largest sweep that fits; what fits of these."""
        for tokens, rows in dict.fromkeys([(chosen.tokens, chosen.chunk_rows), *self.sizes]):
            if rows > chosen.chunk_rows or (tokens != chosen.tokens and not self.free_to_choose):
                continue
            sized = replace(candidate, tokens=chosen.tokens, chunk_rows=rows)
            room = self._room(sized) // 256 * 256
            if self.free_to_choose and 0 < room < chosen.tokens:
                sized = replace(sized, tokens=room)
            if (fitting := self._fitting(sized)) is not None:
                yield fitting

    def _plan(self, chosen: _Candidate, *, grow: bool = True) -> ResidencyPlan:
        chosen, remedy = self._remedied(self._with_chunks_for_banks(chosen, grow), grow)
        sweep = memory_plan(self.spec, self.element, chosen.tokens, chosen.chunk_rows)
        least, depth = self.sizes[-1][1], chosen.depth
        streamed = self._leanest((1, least))
        return ResidencyPlan(
            levels=chosen.levels,
            ranks=self.budget.ranks,
            dtype=self.dtype,
            bank_dtype=self.bank_dtype,
            bank_bytes=self.bank,
            shard_bytes=self.shard,
            prefetch_depth=prefetch_depth(chosen.levels, depth),
            bank_buffers=chosen.buffers,
            staged_shards=staged_shards(chosen.levels, depth),
            kv_blocks=self.pins.kv_blocks,
            sweep=sweep,
            longest_request=self._longest(chosen),
            largest_sweep_tokens=self._room(replace(chosen, chunk_rows=least)),
            largest_streamed_tokens=self._room(streamed),
            device_bytes=self._device_bytes(chosen),
            host_bytes=self._host_bytes(chosen.levels),
            budget=self.budget,
            remedy=remedy,
        )

    def _refusal(self) -> PlanError:
        """Say what the leanest plan would need, and what there is."""
        least = self.sizes[-1]
        leanest = self._leanest(least)
        device, host = self._device_bytes(leanest), self._host_bytes(leanest.levels)
        room = self._room(leanest)
        where = f"{self.budget.ranks} GPU{'s' * (self.budget.ranks > 1)}" if self.budget.kind == "cuda" else "CPU"
        lines = [f"  {name}: {show_bytes(size)}" for name, size in {**device, **host}.items() if size]
        levels = ", ".join(f"{leanest.levels.count(lv)} {lv}" for lv in dict.fromkeys(filter(None, leanest.levels)))
        largest = f"the largest sweep that fits has {room:,} tokens" if room else "no sweep fits, however small"
        return PlanError(
            f"the model does not fit on {where}: with banks {levels or 'nowhere'} and a sweep of {least[0]:,} "
            f"token{'s' * (least[0] != 1)}, each rank needs {show_bytes(sum(device.values()))} of device memory and "
            f"there are {show_bytes(self.budget.device_bytes)}{self._host_there_is(host)}\n"
            + "\n".join(lines)
            + f"\n{largest}; use {self._remedy(host, room)}"
        )

    def _host_there_is(self, host: Mapping[str, int]) -> str:
        if self.budget.kind == "cpu" and not any(host.values()):
            return ""
        unbounded = self.budget.host_bytes >= UNBOUNDED
        there = "no limit of it is given" if unbounded else f"there are {show_bytes(self.budget.host_bytes)}"
        return f"; {show_bytes(sum(host.values()))} of host memory and {there}"

    def _remedy(self, host: Mapping[str, int], room: int) -> str:
        """What may help, the likeliest first; ``room``: tokens of the largest sweep that fits."""
        if self.prefixes:
            return f"a smaller --kv-gib (now {show_bytes(self.prefixes)}; 0 keeps nothing)"
        ways = ["--residency auto"] * (self.pinned is not None) + ["a smaller --max-sweep-tokens"] * (room > 0)
        if self.budget.kind == "cpu":
            ways.append("a larger --host-gib where one is given (half of the free memory is the most)")
            ways += ["fewer --gpus, which share the memory"] * (self.budget.ranks > 1)
        else:
            missing = self.spec.num_sparse_layers * (self.bank if self.budget.ranks == 1 else self.shard)
            if sum(host.values()) + self.bank > self.budget.host_bytes and missing > self.budget.host_bytes:
                ways.append(f"more host memory (--host-gib; all banks take {show_bytes(missing)} a GPU)")
            ways += ["more GPUs", "more device memory (--hbm-gib)"]
        ways += ["8-bit experts (--quantization fp8)"] * (self.bank_dtype != "float8_e4m3fn")
        return ", ".join(ways)


def weight_bytes(spec: ModelSpec, element: int, *, float8: bool = False) -> dict[str, int]:
    """Bytes of everything but the banks, by purpose; each rank of asyncep holds all of it. ``float8``: linear maps are
    kept with one byte a value and four a row, and experts may have scales of blocks, which do not move with them.
    """
    shapes = slot_shapes(spec)
    sizes = {name: math.prod(shape) * element for name, shape in shapes.items()}
    if float8:
        sizes |= {name: math.prod(shapes[name]) + 4 * shapes[name][0] for name in float8_slots(shapes)}
        sizes["scales of experts"] = spec.num_sparse_layers * block_scale_bytes(spec)
    ends = sum(size for name, size in sizes.items() if name in ("embed", "lm_head"))
    return {"embedding and head": ends, "attention, routers, dense": sum(sizes.values()) - ends}
