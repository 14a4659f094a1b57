"""The forest computes every token at most once, loses none, and finds every request's tokens again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prefill.forest import (
    SHARE_EVERYTHING,
    SHARE_NOTHING,
    Forest,
    SharingRule,
    build_forest,
    common_prefixes,
    own_tokens,
    sort_requests,
)

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)
BATCHES = st.lists(st.tuples(TOKENS, st.sampled_from(["", "tenant"])), min_size=1, max_size=24)
RULES = st.sampled_from(
    [
        SHARE_NOTHING,
        SHARE_EVERYTHING,
        SharingRule(min_saved=2, merge_cost=0.3, gather_cost=0.1, levels=1),
        SharingRule(min_saved=0, merge_cost=1.0, gather_cost=0.5, levels=2),
    ]
)


def arrays(batch):
    return [np.asarray(tokens, np.int32) for tokens, _ in batch], [salt for _, salt in batch]


def path_tokens(forest: Forest, request: int, length: int) -> list[int]:
    rows = forest.rows_of(np.full(length, request), np.arange(length))
    return forest.tokens[rows].tolist()


@given(BATCHES, RULES)
def test_every_request_is_found_again(batch, rule):
    sequences, salts = arrays(batch)
    forest = build_forest(sequences, rule, salts)
    for request, sequence in enumerate(sequences):
        assert path_tokens(forest, request, len(sequence)) == sequence.tolist()
        rows = forest.rows_of(np.full(len(sequence), request), np.arange(len(sequence)))
        assert forest.positions[rows].tolist() == list(range(len(sequence)))


@given(BATCHES)
def test_forced_sharing_computes_each_distinct_prefix_once(batch):
    sequences, salts = arrays(batch)
    forest = build_forest(sequences, SHARE_EVERYTHING, salts)
    distinct = {(salt, tuple(s[: n + 1])) for s, salt in zip(sequences, salts, strict=True) for n in range(len(s))}
    assert forest.num_tokens == len(distinct)


@given(BATCHES, RULES)
def test_what_requests_add_is_the_whole_forest(batch, rule):
    sequences, _ = arrays(batch)
    order = sort_requests(sequences)
    lengths = [len(sequences[index]) for index in order]
    own = own_tokens(lengths, common_prefixes(sequences, order), rule)
    assert own.sum() == build_forest(sequences, rule).num_tokens
    assert (own <= lengths).all()


@given(BATCHES, RULES)
def test_structure_is_a_depth_first_forest(batch, rule):
    sequences, salts = arrays(batch)
    forest = build_forest(sequences, rule, salts)
    assert forest.start[0] == 0
    assert (forest.start[1:] == forest.stop[:-1]).all(), "segments are packed without gaps"
    assert (forest.stop > forest.start).all()
    for segment, parent in enumerate(forest.parent):
        if parent < 0:
            assert forest.depth[segment] == 0
            assert forest.first_position[segment] == 0
            continue
        assert forest.depth[segment] == forest.depth[parent] + 1
        assert forest.start[segment] >= forest.stop[parent]
        assert forest.subtree_stop[segment] <= forest.subtree_stop[parent]
        length = forest.stop[parent] - forest.start[parent]
        assert forest.first_position[segment] == forest.first_position[parent] + length
    for level in range(forest.max_depth + 1):
        for segment, ancestor in enumerate(forest.ancestors_at(level)):
            climb = segment
            while climb >= 0 and forest.depth[climb] > level:
                climb = forest.parent[climb]
            assert ancestor == (climb if climb >= 0 and forest.depth[climb] == level else -1)


@given(BATCHES)
def test_salted_requests_share_nothing(batch):
    sequences, salts = arrays(batch)
    forest = build_forest(sequences, SHARE_EVERYTHING, salts)
    owners: dict[int, set[str]] = {}
    for request, salt in enumerate(salts):
        for row in forest.rows_of(np.full(len(sequences[request]), request), np.arange(len(sequences[request]))):
            owners.setdefault(int(row), set()).add(salt)
    assert all(len(salt) == 1 for salt in owners.values())


@given(BATCHES, RULES, st.data())
def test_needed_are_the_rows_that_some_request_does_not_find_in_the_pool(batch, rule, data):
    sequences, salts = arrays(batch)
    forest = build_forest(sequences, rule, salts)
    lengths = np.asarray([len(sequence) for sequence in sequences])
    held = np.asarray([data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences])
    wanted: set[int] = set()
    for request, (begin, end) in enumerate(zip(held, lengths, strict=True)):
        positions = np.arange(begin, end)
        wanted |= set(forest.rows_of(np.full(len(positions), request), positions).tolist())
    assert forest.needed_rows(lengths, held).tolist() == sorted(wanted)
    assert forest.needed_rows(lengths, 0 * held).tolist() == list(range(forest.num_tokens))


@given(BATCHES, RULES, st.randoms())
def test_the_packing_does_not_depend_on_arrival_order(batch, rule, random):
    if not rule.share:
        return
    shuffled = batch[:]
    random.shuffle(shuffled)
    one, two = build_forest(*_split(batch, rule)), build_forest(*_split(shuffled, rule))
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.start.tolist() == two.start.tolist()


def _split(batch, rule):
    sequences, salts = arrays(batch)
    return sequences, rule, salts


def test_a_shared_bos_does_not_pay_but_a_long_prefix_does():
    rule = SharingRule(min_saved=64, merge_cost=0.1, gather_cost=0.02)
    bos = [np.asarray([1, *range(100 * r + 2, 100 * r + 40)], np.int32) for r in range(20)]
    assert build_forest(bos, rule).num_segments == 20
    prefix = list(range(1000, 1300))
    behind = [np.asarray([*prefix, *range(100 * r + 2, 100 * r + 40)], np.int32) for r in range(20)]
    assert build_forest(behind, rule).num_segments == 21


def test_duplicates_and_prefixes_share_one_segment():
    sequences = [np.asarray(s, np.int32) for s in ([1, 2, 3], [1, 2], [1, 2, 3], [1])]
    forest = build_forest(sequences, SHARE_EVERYTHING)
    assert forest.num_segments == 1
    assert forest.tokens.tolist() == [1, 2, 3]
    assert forest.rows_of(np.arange(4), np.asarray([2, 1, 2, 0])).tolist() == [2, 1, 2, 0]


@pytest.mark.parametrize("depth", [2000])
def test_a_deep_chain_does_not_exhaust_the_stack(depth):
    chain = [np.asarray([*range(n), 9999], np.int32) for n in range(1, depth)]
    forest = build_forest(chain, SHARE_EVERYTHING)
    assert forest.num_tokens == (depth - 1) + (depth - 1)
    assert forest.max_depth >= depth - 3
