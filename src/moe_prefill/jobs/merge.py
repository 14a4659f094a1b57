"""Put the outputs of ``--shard 1/N`` to ``--shard N/N`` together into what one job would have written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import InputError, OutputError, UsageError
from .compare import Metrics, metrics_of
from .counts import Counts
from .durable import file_digest, write_durably
from .manifest import FORMAT_VERSION, json_mapping, read_json
from .output import check_place, sidecar_path
from .tables import format_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One shard's output and what its record says of it."""

    path: Path
    record: Mapping[str, object]

    @property
    def identity(self) -> dict[str, object]:
        return json_mapping(self.record, "identity")

    @property
    def shard(self) -> str:
        return str(self.identity["shard"])

    @property
    def rows(self) -> tuple[int, int, int]:
        """First row, end row, and rows of the whole job."""
        rows = self.record["rows"]
        assert isinstance(rows, list)
        first, end, total = rows
        return first, end, total

    def output_number(self, name: str) -> int:
        value = json_mapping(self.record, "output")[name]
        assert isinstance(value, int)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """Counts of all rows, and metrics where the job had a label column."""

    counts: Counts
    metrics: Metrics | None


def merge_shards(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> Merged:
    """Write the whole output from its shards, in any order given; returns what was counted over all rows.

    Raises UsageError for fewer than two files, InputError for a file without its record, a changed or missing shard,
    and shards of different jobs, OutputError where the output exists.
    """
    if len(paths) < 2:
        raise UsageError(f"merge needs the outputs of all shards; {len(paths)} was given")
    check_place(output.absolute())
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists; replace it with --overwrite, or give another -o")
    shards = sorted((_open(path) for path in paths), key=lambda shard: int(shard.shard.split("/")[0]))
    _check_same_job(shards)
    _check_complete(shards)
    _check_format(shards, output)
    for shard in shards:
        _check_unchanged(shard)
    counts = Counts.total(Counts.from_json(json_mapping(shard.record, "counts")) for shard in shards)
    parquet = shards[0].identity["output.format"] == "parquet"
    write_durably(output, lambda file: (_join_parquet if parquet else _join_text)(file, shards))
    _write_record(output, shards, counts)
    labels = json_mapping(shards[0].record, "about").get("labels")
    known = tuple(map(str, labels)) if isinstance(labels, list) and labels else None
    kind = str(shards[0].identity["task.kind"])
    return Merged(counts=counts, metrics=metrics_of(kind, counts, known) if counts.pairs else None)


def _open(path: Path) -> ShardFile:
    sidecar = sidecar_path(path)
    for needed in (path, sidecar):
        if not needed.is_file():
            what = (
                "" if needed == path else " (the record that a job writes beside its output; copy it together with it)"
            )
            raise InputError(f"{needed}: there is no such file{what}")
    return ShardFile(path=path, record=read_json(sidecar))


def _check_same_job(shards: Sequence[ShardFile]) -> None:
    first = shards[0]
    for shard in shards[1:]:
        differing = [
            name
            for name in {**first.identity, **shard.identity}
            if name != "shard" and first.identity.get(name) != shard.identity.get(name)
        ]
        if differing:
            facts = "; ".join(
                f"{name}: {first.identity.get(name)!r} and {shard.identity.get(name)!r}" for name in differing
            )
            raise InputError(f"{first.path} and {shard.path} are not shards of one job: {facts}")


def _check_complete(shards: Sequence[ShardFile]) -> None:
    count = int(shards[0].shard.split("/")[1])
    given = [shard.shard for shard in shards]
    missing = [f"{i}/{count}" for i in range(1, count + 1) if f"{i}/{count}" not in given]
    twice = sorted({name for name in given if given.count(name) > 1})
    other = sorted({name for name in given if not name.endswith(f"/{count}")})
    if missing or twice or other:
        wrong = [(missing, "missing"), (twice, "given twice"), (other, "of another cut")]
        facts = "; ".join(f"{', '.join(names)} {what}" for names, what in wrong if names)
        raise InputError(f"merge needs each of the {count} shards once: {facts}")
    row = 0
    for shard in shards:
        first, end, _ = shard.rows
        assert first in (row, end), (shard.path, row, shard.rows)
        row = max(row, end)
    assert row == shards[0].rows[2], (row, shards[0].rows)


def _check_format(shards: Sequence[ShardFile], output: Path) -> None:
    kind, named = shards[0].identity["output.format"], format_of(output, gzip=False)
    if named not in (None, kind):
        raise UsageError(
            f"{output}: the shards are {kind}, which merge does not turn into {named}; give -o {output.stem}.{kind}"
        )


def _check_unchanged(shard: ShardFile) -> None:
    size, expected = shard.path.stat().st_size, shard.output_number("bytes")
    if size != expected or file_digest(shard.path) != json_mapping(shard.record, "output")["sha256"]:
        raise InputError(
            f"{shard.path}: not the file that its job wrote ({size:,} bytes, {expected:,} recorded); copy it again"
        )


def _join_text(file: IO[bytes], shards: Sequence[ShardFile]) -> None:
    for index, shard in enumerate(shards):
        with shard.path.open("rb") as source:
            source.seek(0 if index == 0 else shard.output_number("header_bytes"))
            shutil.copyfileobj(source, file, 1 << 20)


def _join_parquet(file: IO[bytes], shards: Sequence[ShardFile]) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetFile(shards[0].path) as first:
        schema = first.schema_arrow
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for shard in shards:
            with pq.ParquetFile(shard.path) as source:
                for group in range(source.num_row_groups):
                    table = source.read_row_group(group)
                    writer.write_table(table, row_group_size=max(1, table.num_rows))


def _write_record(output: Path, shards: Sequence[ShardFile], counts: Counts) -> None:
    rows = shards[0].rows[2]
    record = {
        "version": FORMAT_VERSION,
        "identity": {**shards[0].identity, "shard": "1/1"},
        "rows": [0, rows, rows],
        "output": {
            "bytes": output.stat().st_size,
            "sha256": file_digest(output),
            "header_bytes": shards[0].output_number("header_bytes"),
        },
        "counts": counts.to_json(),
        "about": {**json_mapping(shards[0].record, "about"), "merged": [shard.path.name for shard in shards]},
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_durably(sidecar_path(output), lambda file: file.write(text.encode()))
