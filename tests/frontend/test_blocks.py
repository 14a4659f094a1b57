"""Block hashes, and the pool with the table that mirrors it."""

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.blocks import (
    BlockChange,
    BlockEvents,
    BlockHasher,
    BlockPool,
    common_blocks,
    held_blocks,
    sibling_blocks,
)
from moe_prefill.frontend import PrefixTable

RUNS = 2000 if os.environ.get("MOE_PREFILL_LONG") else 150
words = st.lists(st.integers(0, 1), max_size=5)  # a request's blocks: equal prefixes are frequent


def tokens_of(word, extra=0):
    return np.repeat(np.asarray([*word, 9][: len(word) + bool(extra)], np.int32), 16)[: 16 * len(word) + extra]


def chain_of(word, **names):
    return tuple(BlockHasher("m").chain(tokens_of(word), **names))


@given(words, words, st.integers(0, 15))
def test_chains_agree_exactly_as_far_as_whole_blocks_do(a, b, extra):
    one, two = BlockHasher("m").chain(tokens_of(a, extra)), chain_of(b)
    assert len(one) == len(a)
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert [x == y for x, y in zip(one, two, strict=False)] == [i < same for i in range(min(len(a), len(b)))]
    assert common_blocks(one, two) == same
    assert held_blocks(two, 3, set(one)) == min(same, 3)


def test_model_tenant_and_salt_are_part_of_the_name():
    tokens = tokens_of([0, 1])
    names = [
        BlockHasher("m").chain(tokens),
        BlockHasher("n").chain(tokens),
        BlockHasher("m").chain(tokens, tenant="a"),
        BlockHasher("m").chain(tokens, salt="a"),
        BlockHasher("m").chain(tokens, tenant="a", salt="a"),
        BlockHasher("ma").chain(tokens),
    ]
    assert len({digest for chain in names for digest in chain}) == 12


def check_pool(pool, chains):
    held = {digest for chain in chains for digest in chain if digest in pool}
    assert len(held) == len(pool) <= pool.capacity
    slots = pool.slots(tuple(held))
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < pool.capacity for slot in slots)
    for chain in chains:
        assert [digest in pool for digest in chain] == sorted((digest in pool for digest in chain), reverse=True)


@given(st.data(), st.integers(0, 9))
@settings(max_examples=RUNS, deadline=None)
def test_the_table_follows_the_pool_exactly_however_late_events_come(data, capacity):
    pool, table, seen, sent, read = BlockPool(3, capacity), PrefixTable(3), [], [], []
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["store", "fail", "hold", "release", "deliver", "snapshot"])):
            case "store":
                chains = [chain_of(word) for word in data.draw(st.lists(words, min_size=1, max_size=3))]
                seen += chains
                new = pool.store(chains, [data.draw(st.integers(0, len(chain))) for chain in chains])
                assert all(digest in pool for digest in new)
                sent.append(pool.take_events())
            case "fail":
                chain = chain_of(data.draw(words))
                pool.discard(pool.store([chain], [len(chain)]))
                sent.append(pool.take_events())
            case "hold" if seen:
                chain = data.draw(st.sampled_from(seen))
                chain = chain[: pool.match(chain, len(chain))]
                pool.hold(chain)
                read.append(chain)
            case "release" if read:
                pool.release(read.pop())
            case "deliver" if sent:
                table.apply(sent.pop(0))
            case "snapshot":
                sent.append(pool.snapshot())
        check_pool(pool, seen)
        assert all(digest in pool for chain in read for digest in chain), "what is read stays"
    for events in sent:
        assert table.apply(events)
    assert table.audit(list(pool._slots)) == []
    assert not table.oddities


def test_large_sweeps_store_what_is_shared_and_small_ones_everything():
    pool = BlockPool(0, 8)
    shared, alone = chain_of([0, 0]), chain_of([1, 1, 1])
    pool.store([shared, alone], [2, 0])
    assert [digest in pool for digest in (*shared, *alone)] == [True] * 2 + [False] * 3
    pool.store([chain_of([1, 1])], [0])
    assert pool.match(alone, 3) == 2


def test_the_ends_of_the_prefix_that_was_not_used_go_first():
    pool = BlockPool(0, 4)
    old, new = chain_of([0, 0]), chain_of([1, 1])
    pool.store([old], [2])
    pool.store([new], [2])
    pool.store([chain_of([1, 1, 1])], [3])
    assert (pool.match(old, 2), pool.match(new, 2)) == (1, 2)
    pool.hold(old[:1])
    pool.store([chain_of([1, 1, 1, 1])], [4])
    assert pool.match(old, 2) == 1, "it is read"


def test_changes_that_nobody_takes_become_a_snapshot():
    pool, table = BlockPool(0, 2), PrefixTable(0)
    chain = chain_of([0, 0])
    for _ in range(2000):
        pool.store([chain], [2])
    assert sum(len(change.digests) for change in pool._changes) < 2000
    events = pool.take_events()
    assert events.snapshot
    table.apply(events)
    assert table.audit(list(pool._slots)) == []
    pool.store([chain], [2])
    assert [change.kind for change in pool.take_events().changes] == ["used"]


def test_what_siblings_share_is_what_any_two_have_in_common():
    chains = [chain_of(word) for word in ([0, 0, 0], [1, 1], [0, 0, 1], [1], [])]
    assert sibling_blocks(chains) == [2, 1, 2, 1, 0]
    assert sibling_blocks([]) == []


def events(number, *changes, generation=0, **more):
    return BlockEvents(worker=0, generation=generation, number=number, changes=changes, **more)


def test_events_that_do_not_fit_are_counted_and_named():
    table, a, b = PrefixTable(0), b"a" * 16, b"b" * 16
    assert table.apply(events(0, BlockChange("stored", (a, a))))
    table.apply(events(1, BlockChange("used", (b,)), BlockChange("evicted", (b,))))
    assert not table.apply(events(1, BlockChange("evicted", (a,)))), "the same message again"
    assert table.oddities == {
        "stored twice": 1,
        "unknown block used": 1,
        "unknown block evicted": 1,
        "repeated": 1,
    }
    assert table.trusted
    table.apply(events(5, BlockChange("stored", (b,))))
    assert not table.trusted
    assert table.oddities["lost"] == 1
    table.apply(events(9, BlockChange("stored", (b, a)), snapshot=True))
    assert table.trusted
    assert table.audit([b, a]) == []
    assert table.audit([a, b]) == ["the blocks are the same and their order is not"]
    assert table.audit([b]) == ["1 blocks of the table are not in the pool"]
    assert table.audit([b, a, b"c" * 16]) == ["1 blocks of the pool are not in the table"]


def test_a_restarted_worker_begins_with_an_empty_table_and_its_old_events_are_ignored():
    table, a, b = PrefixTable(0), b"a" * 16, b"b" * 16
    table.apply(events(0, BlockChange("stored", (a,))))
    table.promise((b,))
    table.apply(events(0, BlockChange("stored", (b,)), generation=2))
    assert not table.apply(events(1, BlockChange("stored", (a,)), generation=1))
    assert list(table.committed) == [b]
    assert table.oddities == {"restarted": 1, "stale": 1}
    assert table.audit([b]) == ["1 blocks are promised and no request is unfinished"]


@given(st.lists(words, max_size=8), words)
def test_pending_is_what_unfinished_requests_promise(unfinished, asked):
    table, chains = PrefixTable(0), [chain_of(word) for word in unfinished]
    for chain in chains:
        table.promise(chain)
    for chain in chains[1:]:
        assert table.wanted_by_others(chain) == max(
            (common_blocks(chain, other) for other in chains if other is not chain), default=0
        )
    best = max((common_blocks(chain_of(asked), chain) for chain in chains), default=0)
    assert table.match(chain_of(asked), 9) == best
    for chain in chains:
        table.forget(chain)
    assert not table.pending
