"""Attention calls show each query row exactly what it may see, whatever the forest, chunks, levels and window."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_prefill.engine.layout import Runs, all_runs, asked_runs, chunks, ranges
from moe_prefill.forest import SHARE_EVERYTHING, SHARE_NOTHING, Forest, SharingRule, build_forest

BATCHES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=12)
RULES = st.sampled_from([SHARE_NOTHING, SHARE_EVERYTHING, SharingRule(min_saved=2, merge_cost=0.2, levels=1)])


def path_rows(forest: Forest, row: int) -> list[int]:
    """Packed rows that ``row`` may see, in order of position, itself last."""
    segment = int(forest.segment_of_rows(np.asarray([row]))[0])
    rows = list(range(int(forest.start[segment]), row + 1))
    while forest.parent[segment] >= 0:
        segment = int(forest.parent[segment])
        rows = [*range(int(forest.start[segment]), int(forest.stop[segment])), *rows]
    return rows


def seen_rows(chunk, window, residual) -> dict[int, list[int]]:
    """Keys that the chunk's calls show to each of its query rows, from the calls' definition; ``residual``: packed
    rows that have one.
    """
    rows = residual[chunk.rows]
    seen: dict[int, list[int]] = {int(row): [] for row in rows}
    for call in (*chunk.diagonal, *chunk.levels):
        keys = np.arange(call.keys.start, call.keys.stop) if isinstance(call.keys, slice) else call.keys
        assert call.cu_k[-1] == len(keys)
        for entry in range(len(call.cu_q) - 1):
            q0, q1 = int(call.cu_q[entry]), int(call.cu_q[entry + 1])
            mine = keys[call.cu_k[entry] : call.cu_k[entry + 1]]
            for index in range(q0, q1):
                stop = len(mine) - (q1 - 1 - index) if call.causal else len(mine)
                start = max(0, stop - window) if call.causal and window is not None else 0
                seen[int(rows[call.first_row + index])] += mine[start:stop].tolist()
    return seen


def assert_paths_are_seen(forest: Forest, runs: Runs, computed: Runs | None, window, **cut) -> None:
    residual = np.arange(forest.num_tokens) if computed is None else computed.rows()
    covered: list[int] = []
    for chunk in chunks(forest, runs, computed=computed, window=window, **cut):
        assert chunk.num_rows <= cut["max_rows"]
        for row, keys in seen_rows(chunk, window, residual).items():
            want = path_rows(forest, row)
            assert sorted(keys) == sorted(want if window is None else want[-window:])
            covered.append(row)
    assert covered == runs.rows().tolist()


@given(
    BATCHES,
    RULES,
    st.sampled_from([None, 1, 3, 8]),
    st.integers(0, 4),
    st.integers(1, 9),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_every_row_sees_its_path_and_nothing_else(batch, rule, window, levels, max_rows, max_keys, random):
    forest = build_forest([np.asarray(tokens, np.int32) for tokens in batch], rule)
    cut = {"levels": levels, "max_rows": max_rows, "max_keys": max_keys}
    some = sorted(random.sample(range(forest.num_tokens), random.randint(1, forest.num_tokens)))
    asked = asked_runs(forest, np.asarray(some))
    assert set(some) <= set(asked.rows().tolist())
    assert_paths_are_seen(forest, all_runs(forest), None, window, **cut)
    assert_paths_are_seen(forest, asked, None, window, **cut)
    # Others come from a pool: they have keys, but ask nothing.
    more = sorted({*asked.rows().tolist(), *random.sample(range(forest.num_tokens), random.randint(0, len(some)))})
    computed = asked_runs(forest, np.asarray(more))
    assert_paths_are_seen(forest, computed, computed, window, **cut)
    assert_paths_are_seen(forest, asked, computed, window, **cut)


def test_ranges():
    assert ranges(np.asarray([3, 10, 7]), np.asarray([5, 10, 9])).tolist() == [3, 4, 7, 8]


def test_many_asked_positions_in_one_long_segment_become_one_run():
    forest = build_forest([np.arange(1000, dtype=np.int32)], SHARE_NOTHING)
    assert len(asked_runs(forest, np.arange(0, 1000, 10))) == 1
    assert len(asked_runs(forest, np.asarray([5, 900]))) == 2
