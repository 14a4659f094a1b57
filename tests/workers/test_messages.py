"""Every message comes back as it went, whatever pieces it arrives in; anything else is refused."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.blocks import BlockChange, BlockEvents
from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest, AtomicResult, EngineLimits, RankFacts, RunStats
from moe_prefill.errors import WorkerError
from moe_prefill.forest import SharingRule
from moe_prefill.forming import Forming
from moe_prefill.messages import (
    Audit,
    Decoder,
    EnginePlan,
    Failure,
    Hello,
    PackedChains,
    PackedEvents,
    PackedRequests,
    PackedResults,
    PoolState,
    Ready,
    Score,
    Scored,
    Shutdown,
    Start,
    encode,
)
from tests.costmodel.models import model_spec

ids = st.integers(-(2**31), 2**31 - 1)


def int32(values) -> np.ndarray:
    return np.asarray(values, np.int32)


@st.composite
def atomic_requests(draw) -> AtomicRequest:
    tokens = draw(st.lists(ids, min_size=1, max_size=9))
    positions = sorted(draw(st.sets(st.integers(0, len(tokens) - 1), min_size=1)))
    counts = draw(st.lists(st.integers(0, 3), min_size=len(positions), max_size=len(positions)))
    asked = draw(st.lists(ids, min_size=sum(counts), max_size=sum(counts)))
    vocabulary = draw(st.booleans())
    return AtomicRequest(
        int32(tokens),
        int32(positions),
        int32(asked),
        int32([0, *np.cumsum(counts)]),
        vocabulary,
        draw(st.integers(0, 3)) if vocabulary else 0,
        draw(st.sampled_from(["", "tenant", "Ü\ud800\0x"])),
    )


@st.composite
def atomic_results(draw) -> AtomicResult:
    floats = st.floats(width=32)
    logits = np.asarray(draw(st.lists(floats, max_size=6)), np.float32)
    if draw(st.booleans()):
        return AtomicResult(logits)
    log_z = np.asarray(draw(st.lists(floats, min_size=1, max_size=3)), np.float32)
    k = draw(st.integers(0, 3))
    if k == 0:
        return AtomicResult(logits, log_z)
    shape = (len(log_z), k)
    top = np.asarray(draw(st.lists(floats, min_size=len(log_z) * k, max_size=len(log_z) * k)), np.float32)
    return AtomicResult(logits, log_z, int32(np.arange(top.size)).reshape(shape), top.reshape(shape))


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if hasattr(a, "__slots__") and type(a) is type(b):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__slots__)
    return type(a) is type(b) and a == b


def through_the_wire(message, pieces: int = 1):
    data = b"".join(encode(message))
    decoder, found = Decoder(), []
    step = max(1, -(-len(data) // pieces))
    for begin in range(0, len(data), step):
        found += decoder.feed(data[begin : begin + step])
    return found


@settings(deadline=None, max_examples=60)
@given(st.lists(atomic_requests(), max_size=6), st.integers(1, 40))
def test_requests_come_back(requests, pieces):
    (message,) = through_the_wire(Score(number=7, requests=PackedRequests.pack(requests)), pieces)
    assert message.number == 7
    assert all(same(a, b) for a, b in zip(message.requests.unpack(), requests, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(atomic_results(), max_size=6), st.integers(1, 40))
def test_results_come_back(results, pieces):
    stats = RunStats(sweeps=1, flops=10**18, busy_s=0.5)
    (message,) = through_the_wire(Scored(number=3, results=PackedResults.pack(results), stats=stats), pieces)
    assert message.stats == stats
    assert all(same(a, b) for a, b in zip(message.results.unpack(), results, strict=True))


@pytest.mark.parametrize(
    "message",
    [
        Hello(version=1, rank=3, pid=17),
        Start(config=EngineConfig(model="m", sharing="force", max_sweep_tokens=9), size=4, store_port=1234),
        Ready(
            plan=EnginePlan(
                limits=EngineLimits(max_request_tokens=1, max_sweep_tokens=4, vocab_size=3, chunk_rows=2),
                forming=Forming(
                    limits=EngineLimits(max_request_tokens=1, max_sweep_tokens=2, vocab_size=3),
                    rule=SharingRule(min_saved=0.5),
                    private_beyond=64,
                ),
                schedule="rounds",
                plan_digest="d",
                peak_flops=None,
                facts=RankFacts(
                    spec=model_spec(((True, 64), (False, None))),
                    device="cpu",
                    precision="float32",
                    levels=("resident", None),
                    bank_bytes=7,
                    bank_buffers=2,
                ),
            ),
            layer_s=0.1,
        ),
        Audit(),
        Failure(code="PlanError", message="häßlich \n"),
        Shutdown(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_plain_messages_come_back(message):
    two = through_the_wire(message, 5) + through_the_wire(message)
    assert two == [message, message]


digests = st.binary(min_size=16, max_size=16)
chains_of = st.lists(st.lists(digests, max_size=3).map(tuple), max_size=5)


@settings(deadline=None, max_examples=40)
@given(chains_of, st.booleans())
def test_chains_and_events_of_a_pool_come_back(chains, snapshot):
    shared = [len(chain) // 2 for chain in chains]
    packed = PackedChains.pack(chains, shared)
    (score,) = through_the_wire(Score(number=1, requests=PackedRequests.pack([]), chains=packed), 7)
    assert score.chains.unpack() == (chains, shared)
    changes = tuple(BlockChange("stored", chain) for chain in chains)
    events = BlockEvents(worker=1, generation=2, number=3, changes=changes, snapshot=snapshot)
    (state,) = through_the_wire(PoolState(events=PackedEvents.pack(events)), 7)
    assert state.events.unpack() == events


def test_digests_that_do_not_add_up_are_refused():
    packed = PackedChains.pack([(bytes(16),)], [0])
    with pytest.raises(WorkerError):
        PackedChains(digests=packed.digests[:3], num_blocks=packed.num_blocks, shared_blocks=packed.num_blocks).unpack()


def test_a_hundred_thousand_requests_are_ten_arrays():
    requests = [AtomicRequest.candidates(np.arange(20), [1, 2], salt=str(i % 3)) for i in range(100_000)]
    packed = PackedRequests.pack(requests)
    data = encode(Score(number=0, requests=packed))
    assert len(data) <= 2 + 2 * 9
    assert len(data[1]) < 1000  # the header does not grow with the requests
    assert len(packed.unpack()) == len(requests)


def frame(about: object, payload: bytes = b"") -> bytes:
    header = json.dumps(about).encode()
    return struct.pack("<4sIQ", b"MoEP", len(header), len(payload)) + header + payload


GOOD = {"type": "Hello", "body": {"version": 1, "rank": 0, "pid": 1}, "arrays": []}


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<4sIQ", b"MoEP", 1 << 31, 0),
        struct.pack("<4sIQ", b"MoEP", 0, 1 << 60),
        frame([]),
        frame("Hello"),
        frame(GOOD | {"type": "Goodbye"}),
        frame(GOOD | {"body": {"version": 1}}),
        frame(GOOD | {"body": {"version": 1, "rank": 0, "pid": 1, "more": 2}}),
        frame(GOOD | {"body": None}),
        frame(GOOD | {"arrays": [["<i4", 2]]}, b"1234"),
        frame(GOOD | {"arrays": [["<i4", -1]]}),
        frame(GOOD | {"arrays": [["|O", 1]]}, bytes(8)),
        frame(GOOD, bytes(8)),
        frame({"type": "Score", "body": {"number": 1, "requests": 0}, "arrays": []}),
    ],
)
def test_broken_frames_are_refused(data):
    with pytest.raises(WorkerError, match="a broken message"):
        list(Decoder().feed(data))


def test_counts_that_do_not_add_up_are_refused():
    packed = PackedRequests.pack([AtomicRequest.candidates([1, 2, 3], [4])])
    for name in ("tokens", "positions", "ids", "num_ids", "num_tokens"):
        fields = {key: getattr(packed, key) for key in packed.__slots__}
        broken = PackedRequests(**fields | {name: np.append(fields[name], np.int32(1)).astype(np.int32)})
        with pytest.raises((WorkerError, ValueError)):
            broken.unpack()
