"""Shards of a job, and putting their outputs together."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fakes import FakeTask
from helpers import rows, run, write_table

from moe_prefill.errors import InputError, OutputError, UsageError
from moe_prefill.jobs import Shard, merge_shards, sidecar_path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_merged_shards_are_the_whole_output(tmp_path: Path, kind: str, count: int) -> None:
    source = write_table(tmp_path / f"in.{kind}", rows(30))
    whole = run(source, tmp_path / f"whole.{kind}", label_column="gold")
    shards = [tmp_path / f"out-{i}.{kind}" for i in range(1, count + 1)]
    for index, shard in enumerate(shards, start=1):
        run(source, shard, shard=Shard(index, count), label_column="gold")
    merged = tmp_path / f"merged.{kind}"
    if count == 1:
        with pytest.raises(UsageError, match="all shards"):
            merge_shards(shards, merged)
        return
    both = merge_shards(shards[::-1], merged)
    assert (both.counts, both.metrics) == (whole.counts, whole.metrics)
    if kind == "parquet":
        assert pq.read_table(merged).equals(pq.read_table(tmp_path / "whole.parquet"), check_metadata=True)
    else:
        assert merged.read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        merge_shards(shards, merged)


def test_merge_refuses_what_does_not_belong_together(source: Path, tmp_path: Path) -> None:
    shards = [tmp_path / f"out-{i}.csv" for i in (1, 2, 3)]
    for index, shard in enumerate(shards, start=1):
        run(source, shard, shard=Shard(index, 3))
    other = tmp_path / "other.csv"
    run(source, other, shard=Shard(2, 3), task=FakeTask("task-b"))
    merged = tmp_path / "merged.csv"
    with pytest.raises(InputError, match=r"each of the 3 shards once: 2/3 missing$"):
        merge_shards([shards[0], shards[2]], merged)
    with pytest.raises(InputError, match=r"once: 1/3 given twice$"):
        merge_shards([shards[0], *shards], merged)
    with pytest.raises(InputError, match=r"not shards of one job: task\.digest"):
        merge_shards([shards[0], other, shards[2]], merged)
    with pytest.raises(UsageError, match=r"the shards are csv, .* not turn into jsonl; give -o merged\.csv"):
        merge_shards(shards, tmp_path / "merged.jsonl")
    with pytest.raises(OutputError, match="does not exist"):
        merge_shards(shards, tmp_path / "nowhere" / "merged.csv")
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(InputError, match="not the file that its job wrote"):
        merge_shards(shards, merged)
    sidecar_path(shards[1]).unlink()
    with pytest.raises(InputError, match="record"):
        merge_shards(shards, merged)
    assert not merged.exists()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3"])
def test_shards_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        Shard.parse(text)
