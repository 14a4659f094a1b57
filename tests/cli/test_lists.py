"""Lists among the answers keep their types in Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_prefill.cli import main


def test_a_ranking_keeps_its_types(model: Path, tmp_path: Path, engine: Callable[..., None]) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "q", "docs": ["a", "b", "c"]}) + "\n" + '{"text": "q"}\n')
    command = ["rank", str(tmp_path / "in.jsonl"), "--model", str(model), "--candidates-column", "docs", "--quiet"]
    assert main([*command, "-o", str(tmp_path / "out.parquet")]) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("ranking_indices").type == pa.list_(pa.int64())
    first, second = table.to_pylist()
    assert [first["docs"][i] for i in first["ranking_indices"]] == first["ranking"]
    assert second["ranking_indices"] is None


def test_log_probabilities_of_candidates_are_lists_of_lists(
    model: Path, tmp_path: Path, engine: Callable[..., None]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"ids": [1, 2, 3], "of": [4, 5]}\n')
    command = ["score", str(tmp_path / "in.jsonl"), "--model", str(model), "--token-ids-column", "ids", "--quiet"]
    assert main([*command, "--candidate-ids-column", "of", "-o", str(tmp_path / "out.parquet")]) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("candidate_logprobs").type == pa.list_(pa.list_(pa.float64()))
    assert [len(part) for part in table.to_pylist()[0]["candidate_logprobs"]] == [2, 2, 2]
