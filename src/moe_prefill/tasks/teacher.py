"""Teacher scoring: log-probabilities of given token ids at given positions of a prompt that is given as ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core import AtomicRequest, AtomicResult, Column, EngineLimits, Int32Array, PreparedRow
from ..errors import RowError
from ..text import Tokenizer
from .base import Preview, Row
from .common import check_outputs, digest_of, prefixed
from .config import ScoreConfig
from .prompts import too_long
from .score import is_greedy, top_lists
from .template import check_columns, list_of

_NEXT = (
    Column(name="logprob", kind="float"),
    Column(name="num_tokens", kind="int"),
    Column(name="token_logprobs", kind="floats"),
)
_GIVEN = (Column(name="candidate_logprobs", kind="float_lists"),)
_TOP = (Column(name="top_logprobs", kind="json"),)
_GREEDY = (Column(name="is_greedy", kind="bool"),)


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """The row's ids, int32 [T]."""

    ids: Int32Array


class TeacherTask:
    """Scores next tokens, or the row's own candidate ids, at all positions or at the row's own ones. Nothing is cut."""

    name = "score"

    def __init__(
        self, config: ScoreConfig, tokenizer: Tokenizer, limits: EngineLimits, columns: Sequence[str] | None = None
    ) -> None:
        assert config.token_ids_column is not None
        self._config = config
        self._ids_column = config.token_ids_column
        self._limits = limits
        given = config.candidate_ids_column is not None
        outputs = (*(_GIVEN if given else _NEXT), *(_GREEDY if config.top_k and not given else ()))
        outputs = (*outputs, *(_TOP if config.top_k else ()))
        self.columns = prefixed(outputs, config.output_prefix)
        self.answer_column = self.columns[0].name
        read = (config.token_ids_column, config.positions_column, config.candidate_ids_column)
        self.placeholders = frozenset(name for name in read if name is not None)
        self.digest = digest_of(self.name, config, "", tokenizer, None, limits)
        check_columns(self.placeholders, columns)
        check_outputs(self.columns, columns)

    def prepare(self, rows: Sequence[Row]) -> list[PreparedRow | RowError]:
        return [self._prepare(row) for row in rows]

    def finish(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> dict[str, object]:
        (request,), (result,) = prepared.requests, results
        logprobs = result.logprobs(request)
        values: list[object]
        if self._config.candidate_ids_column is not None:
            values = [[part.tolist() for part in np.split(logprobs, request.id_offsets[1:-1])]]
        else:
            values = [float(logprobs.sum(dtype=np.float64)), len(logprobs), logprobs.tolist()]
            if self._config.top_k:
                values.append(is_greedy(request, result))
        if self._config.top_k:
            values.append(top_lists(result))
        return {column.name: value for column, value in zip(self.columns, values, strict=True)}

    def notes(self, prepared: PreparedRow, results: Sequence[AtomicResult]) -> tuple[str, ...]:
        return ()

    def preview(self, prepared: PreparedRow) -> list[Preview]:
        request, state = prepared.requests[0], prepared.state
        assert isinstance(state, _Given), type(state)
        parts = np.split(request.ids, request.id_offsets[1:-1])
        named = zip(request.positions.tolist(), parts, strict=True)
        return [Preview(state.ids, tuple((f"position {at}", tuple(part.tolist())) for at, part in named))]

    def _prepare(self, row: Row) -> PreparedRow | RowError:
        try:
            ids = self._ids(list_of(row, self._ids_column), self._ids_column)
            positions = self._positions(row, len(ids))
            candidates = self._candidates(row, ids, positions)
        except RowError as error:
            return error.kept()
        counts = [len(part) for part in candidates]
        request = AtomicRequest(
            ids[: positions[-1] + 1],
            positions,
            np.concatenate(candidates),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            vocabulary=True,
            top_k=self._config.top_k,
        )
        if len(request.tokens) > self._limits.max_request_tokens:
            return too_long(len(request.tokens), self._limits.max_request_tokens, "error")
        return PreparedRow((request,), _Given(ids))

    def _positions(self, row: Row, length: int) -> Int32Array:
        """Int32 [A], strictly increasing, each with a next token unless candidates are given."""
        name = self._config.positions_column
        last = length - 1 if self._config.candidate_ids_column is not None else length - 2
        if name is None:
            positions = np.arange(last + 1, dtype=np.int32)
        else:
            positions = _integers(list_of(row, name), name)
        if not len(positions):
            raise RowError("nothing_to_score", f"no position is asked of a prompt of {length} tokens")
        if positions[0] < 0 or positions[-1] > last or (np.diff(positions) <= 0).any():
            raise RowError("bad_positions", f"positions {positions[:8].tolist()} must increase and lie in 0 to {last}")
        return positions

    def _candidates(self, row: Row, ids: Int32Array, positions: Int32Array) -> list[Int32Array]:
        name = self._config.candidate_ids_column
        if name is None:
            return [ids[at + 1 : at + 2] for at in positions.tolist()]
        lists = list_of(row, name)
        if lists and not any(isinstance(entry, list | tuple) for entry in lists):
            lists = [lists] * len(positions)  # one list for all positions
        if len(lists) != len(positions):
            raise RowError("bad_list", f"column {name!r} has {len(lists)} lists for {len(positions)} positions")
        return [self._ids(entry, name) for entry in lists]

    def _ids(self, values: object, name: str) -> Int32Array:
        ids = _integers(values, name)
        if not len(ids):
            raise RowError("empty_text", f"column {name!r} has an empty list of ids")
        if ids.min() < 0 or ids.max() >= self._limits.vocab_size:
            limit = self._limits.vocab_size - 1
            raise RowError(
                "bad_ids", f"column {name!r} has ids from {ids.min()} to {ids.max()}; the model's go to {limit}"
            )
        return ids


def _integers(values: object, name: str) -> Int32Array:
    if not isinstance(values, list | tuple) or any(
        isinstance(value, bool) or not isinstance(value, int | np.integer) for value in values
    ):
        raise RowError("bad_list", f"column {name!r} needs a list of whole numbers, not {str(values)[:60]!r}")
    if any(abs(value) >= 2**31 for value in values):
        raise RowError("bad_ids", f"column {name!r} has a number beyond 32 bits")
    return np.array(values, dtype=np.int32)
