"""The paper's workload by its numbers, traces and tables; and the benchmark's file on a small draw."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_prefill.blocks import BlockHasher
from moe_prefill.errors import InputError, UsageError
from moe_prefill.workloads import (
    MIXES,
    make_workload,
    read_trace,
    skewed_lengths,
    spread_lengths,
    write_table,
    write_trace,
)

ROOT = Path(__file__).resolve().parents[2]
TABLE_2 = {  # requests, tokens, shortest, longest
    "moral-stories": (24_000, 3_300_000, 100, 200),
    "mmlu": (24_000, 5_800_000, 50, 500),
    "boolq": (12_000, 2_700_000, 200, 600),
    "imdb": (12_000, 5_500_000, 300, 2000),
    "quality": (1_200, 10_500_000, 3_900, 12_100),
    "arxiv": (600, 10_100_000, 6_000, 128_000),
}


def by_source(workload):
    found = {}
    for request, source in zip(workload.requests, workload.sources, strict=True):
        found.setdefault(source, []).append(request.tokens)
    return found


@pytest.fixture(scope="module")
def aggregated():
    return make_workload("aggregated")


def test_the_aggregated_workload_is_table_2(aggregated):
    assert (len(aggregated.requests), aggregated.num_tokens) == (73_800, 37_900_000)
    assert not aggregated.arrival_s.any()
    parts = by_source(aggregated)
    assert parts.keys() == TABLE_2.keys()
    for source, (count, tokens, low, high) in TABLE_2.items():
        lengths = [len(each) for each in parts[source]]
        assert (len(lengths), sum(lengths)) == (count, tokens), source
        assert low <= min(lengths), source
        assert max(lengths) <= high, source


def test_the_aggregated_workload_shares_what_it_should(aggregated):
    parts = by_source(aggregated)
    heads = {source: Counter(t[:25].tobytes() for t in tokens) for source, tokens in parts.items()}
    assert len(heads["mmlu"]) == 57
    assert len(heads["boolq"]) == len(heads["imdb"]) == len(heads["moral-stories"]) == 1
    assert sorted(Counter(heads["arxiv"].values()).items()) == [(1, 240), (2, 180)]
    assert len(heads["quality"]) == 68
    assert set(heads["quality"].values()) == {17, 18}
    stories = Counter(t[: 40 + 30].tobytes() for t in parts["moral-stories"])
    assert set(stories.values()) == {2}
    sources = aggregated.sources[:2000]
    assert sum(a != b for a, b in pairwise(sources)) > 1000, "shuffled"


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_are_repeatable_and_scale(mix):
    one, same, other = (make_workload(mix, scale=0.01, seed=seed) for seed in (0, 0, 1))
    assert [r.tokens.tobytes() for r in one.requests] == [r.tokens.tobytes() for r in same.requests]
    assert [r.tokens.tobytes() for r in one.requests] != [r.tokens.tobytes() for r in other.requests]
    assert len(set(one.arrival_s.tolist())) == (8 if mix == "bursts" else 1)
    blocks = Counter(BlockHasher("m").chain(r.tokens)[0] for r in one.requests)
    assert (max(blocks.values()) == 1) == (mix == "none")


def test_an_unknown_mix_is_refused():
    with pytest.raises(UsageError, match="there is no workload 'lots'; there are aggregated"):
        make_workload("lots")


@pytest.mark.parametrize("draw", [spread_lengths, skewed_lengths])
@pytest.mark.parametrize("total", [1001, 5000, 19_999])
def test_lengths_are_in_range_and_add_up(draw, total):
    lengths = draw(np.random.default_rng(0), 100, 10, 200, total)
    assert (len(lengths), lengths.sum()) == (100, total)
    assert lengths.min() >= 10
    assert lengths.max() <= 200


@pytest.mark.parametrize("block_tokens", [16, 512])
def test_a_trace_keeps_lengths_arrivals_and_shared_blocks(tmp_path, block_tokens):
    low = make_workload("low", scale=0.002)
    workload = replace(low, arrival_s=np.arange(len(low.requests)) // 9 / 4)
    write_trace(workload, tmp_path / "trace.jsonl", block_tokens=block_tokens)
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert lines[-1].keys() == {"timestamp", "input_length", "output_length", "hash_ids"}
    back = read_trace(tmp_path / "trace.jsonl", block_tokens=block_tokens)
    assert [len(r.tokens) for r in back.requests] == [len(r.tokens) for r in workload.requests]
    assert back.arrival_s.tolist() == workload.arrival_s.tolist()

    def shared(requests):
        chunks = [
            [r.tokens[: i + block_tokens].tobytes() for i in range(0, len(r.tokens), block_tokens)] for r in requests
        ]
        names = {}
        return [[names.setdefault(chunk, len(names)) for chunk in each] for each in chunks]

    assert shared(back.requests) == shared(workload.requests)


@pytest.mark.parametrize(
    "line", ["{", "{}", '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}', "7"]
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path, line):
    good = '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}'
    (tmp_path / "trace.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match="line 2"):
        read_trace(tmp_path / "trace.jsonl")


def test_a_table_holds_what_the_score_command_reads(tmp_path):
    workload = make_workload("low", scale=0.002)
    write_table(workload, tmp_path / "table.parquet")
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(range(len(workload.requests)))
    for row, request in zip(rows, workload.requests, strict=True):
        assert row["token_ids"] == request.tokens.tolist()
        assert row["positions"] == [len(request.tokens) - 1]
        assert row["candidate_ids"] == [request.ids.tolist()]


def test_the_benchmark_writes_its_cells_and_a_plot(tmp_path):
    out = tmp_path / "sim.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "frontend_sim.py"), "--scale", "0.004", "--workers", "2", "8"]
    command += ["--table-blocks", "1000"]
    subprocess.run([*command, "--mixes", "aggregated", "none", "--out", str(out)], check=True, capture_output=True)
    report = json.loads(out.read_text())
    cells = report["cells"]
    assert {(c["mix"], c["workers"], c["kv_gib"]) for c in cells} == {
        ("aggregated", 8, 12),
        ("aggregated", 8, 0),
        ("aggregated", 2, 12),
        ("none", 8, 12),
    }
    assert all(c["tokens_per_s"] > 0 and c["imbalance"] >= 1 for c in cells)
    assert all(c["saved_fraction"] == c["oracle_fraction"] == 0 for c in cells if c["mix"] == "none")
    assert report["routing"]["requests"] == cells[0]["requests"]
    assert report["tables"]["blocks"] == 1000
    assert out.with_suffix(".svg").read_text().count("<rect") > 14
