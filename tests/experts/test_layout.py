"""Banks as bytes: views that alias one buffer, aligned records, shards of experts that ranks need not divide."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.experts import BankLayout
from moe_prefill.residency import RECORD_ALIGNMENT, expert_record
from moe_prefill.residency.record import ExpertRecord
from tests.reference import convert, random_model


def record_of(dtype: str) -> ExpertRecord:
    return expert_record(convert(random_model("qwen3_moe", 1)).spec, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_views_are_the_buffer_without_overlap(dtype):
    record = record_of(dtype)
    layout = BankLayout(5, record)
    buffer = torch.zeros(layout.bank_bytes, dtype=torch.uint8)
    views = layout.views(buffer)
    for number, view in enumerate(views.values(), start=1):
        as_bytes = view.reshape(5, -1, 1).view(torch.uint8)  # a copy: views are strided
        assert not as_bytes.any(), "fields overlap"
        view.view(torch.uint8).fill_(number)
    used = sum(field.num_bytes for field in record.fields)
    assert int((buffer != 0).sum()) == 5 * used
    assert all(field.offset % RECORD_ALIGNMENT == 0 for field in record.fields)
    assert [tuple(v.shape[1:]) for v in views.values()] == [field.shape for field in record.fields]
    assert all(view.stride(0) * view.itemsize == record.num_bytes for view in views.values())
    assert all(view[0].is_contiguous() for view in views.values())


def test_float8_brings_its_scales():
    assert [field.name for field in record_of("float8_e4m3fn").fields] == [
        "gate_up",
        "down",
        "gate_up_scale",
        "down_scale",
    ]


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 130), size=st.integers(1, 9))
def test_shards_cover_a_bank_and_differ_by_at_most_one_expert(experts, size):
    layout = BankLayout(experts, ExpertRecord((), RECORD_ALIGNMENT))
    shards = layout.shards(size)
    assert shards[0].start == 0
    assert shards[-1].stop == layout.bank_bytes
    assert all(a.stop == b.start for a, b in itertools.pairwise(shards))
    counts = [(shard.stop - shard.start) // RECORD_ALIGNMENT for shard in shards]
    assert max(counts) - min(counts) <= 1
