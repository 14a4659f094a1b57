"""Traces are read from the events that torch writes; those of a GPU are made by hand here."""

import pytest
import torch

from moe_prefill import ops
from moe_prefill.bench.breakdown import (
    CATEGORIES,
    Span,
    _trace,
    classify,
    cpu_spans,
    gpu_spans,
    marked_operations,
    summary,
)


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def launch(ts, correlation, cat="cuda_runtime"):
    return event(cat, "cudaLaunchKernel", ts, 1, correlation=correlation)


TRACE = [
    event("user_annotation", "moe_prefill.experts", 10, 20),
    launch(12, 1),
    launch(15, 2, "cuda_driver"),
    launch(35, 3),
    launch(36, 4),
    event("kernel", "nvjet_tst_128x256", 100, 50, tid=7, stream=7, correlation=1),
    event("kernel", "_combine_kernel", 150, 10, tid=7, stream=7, correlation=2),
    event("kernel", "nvjet_tst_128x256", 200, 30, tid=7, stream=7, correlation=3),
    event("kernel", "void flash::FlashAttnFwdSm90<cutlass::half_t>(int)", 230, 70, tid=7, stream=7, correlation=4),
    event("gpu_memcpy", "Memcpy HtoD", 90, 500, tid=9, stream=9, correlation=5),
    {"ph": "M", "name": "process_name"},
]


def test_kernels_belong_to_the_operation_that_launched_them():
    spans = gpu_spans(TRACE)
    assert [(span.name[:5], span.operation) for span in spans] == [
        ("nvjet", "experts"),
        ("_comb", "experts"),
        ("nvjet", ""),
        ("void ", ""),
    ]


def test_categories_add_up_to_the_sweep():
    found = summary(gpu_spans(TRACE), exposed_ms=0.015)
    assert found["sweep_ms"] == pytest.approx(0.2)
    expected = {
        "experts": 0.05,
        "memory-bound": 0.01,
        "dense": 0.03,
        "attention": 0.07,
        "exposed transfer": 0.015,
        "gaps": 0.025,
    }
    assert found["ms"] == pytest.approx(expected)
    assert found["kernels"][0] == ["", "flash::FlashAttnFwdSm90<cutlass::half_t>", pytest.approx(0.07)]


def test_threads_side_by_side_share_the_time():
    spans = [Span("aten::mm", "experts", 0, 100), Span("aten::mul", "", 0, 100), Span("aten::mm", "", 150, 200)]
    found = summary(spans)
    assert sum(found["ms"].values()) == pytest.approx(0.2)
    assert found["ms"]["gaps"] == pytest.approx(0.05)


def test_an_empty_trace_is_nothing():
    assert gpu_spans([]) == cpu_spans([]) == []
    assert summary([])["sweep_ms"] == 0.0


@pytest.mark.parametrize(
    ("name", "operation", "category"),
    [
        ("sm90_xmma_gemm_bf16", "", "dense"),
        ("sm90_xmma_gemm_bf16", "experts", "experts"),
        ("_grouped_mm_kernel", "experts", "experts"),
        ("cutlass::device_kernel<flash::FlashAttnFwd>", "", "attention"),
        ("_swiglu_quantize_kernel", "experts", "memory-bound"),
        ("sm90_fp8_gemm_1d2d_impl", "experts", "experts"),
        ("vectorized_elementwise_kernel", "attention", "attention"),
        ("_rms_norm_kernel", "rms_norm", "memory-bound"),
        ("_combine_rms_norm_kernel", "experts", "memory-bound"),
        ("aten::addmm", "", "dense"),
    ],
)
def test_classes(name, operation, category):
    assert classify(name, operation) == category
    assert category in CATEGORIES


def test_own_time_leaves_out_what_a_call_calls():
    trace = [
        event("user_annotation", "moe_prefill.rms_norm", 0, 60),
        event("cpu_op", "outer", 0, 50),
        event("cpu_op", "inner", 10, 20),
        event("cpu_op", "leaf", 15, 5),
        event("cpu_op", "later", 70, 5),
        event("cpu_op", "other thread", 12, 8, tid=2),
    ]
    times = {}
    for span in cpu_spans(trace):
        key = (span.name, span.operation)
        times[key] = times.get(key, 0.0) + span.end - span.begin
    assert times == {
        ("outer", "rms_norm"): 30.0,
        ("inner", "rms_norm"): 15.0,
        ("leaf", "rms_norm"): 5.0,
        ("later", ""): 5.0,
        ("other thread", ""): 8.0,
    }


def test_torchs_own_trace_is_understood():
    x, weight = torch.randn(256, 512), torch.ones(512)
    spans = cpu_spans(_trace(lambda: (ops.rms_norm(x, weight, 1e-6), x @ x.T), on_gpu=False))
    assert any(span.operation == "rms_norm" for span in spans)
    assert any(span.name == "aten::mm" and span.operation == "" for span in spans)


def test_operations_are_marked_for_a_while_only():
    before = ops.rms_norm
    with marked_operations():
        assert ops.rms_norm is not before
    assert ops.rms_norm is before
