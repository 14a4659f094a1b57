"""Tables read and written: values, order and types survive; what is wrong is named."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import open_for, rows, run, write_table
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.errors import InputError, UsageError
from moe_prefill.jobs.tables import FORMATS, choose_format, find_files
from moe_prefill.jobs.tables.csv_table import CsvTable
from moe_prefill.jobs.tables.jsonl_table import JsonlTable
from moe_prefill.jobs.tables.values import csv_field, json_text

ADDED = ["label", "probability", "probabilities", "ranking", "detail", "error"]


def read_back(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist(maps_as_pydicts="strict")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("source_kind", FORMATS)
@pytest.mark.parametrize("output_kind", FORMATS)
def test_every_format_pair(tmp_path: Path, source_kind: str, output_kind: str) -> None:
    table = rows(30)
    source = write_table(tmp_path / f"in.{source_kind}", table)
    output = tmp_path / f"out.{output_kind}"
    run(source, output)
    answers = read_back(output)
    assert [list(answer) for answer in answers] == [["id", "text", "gold", *ADDED]] * 30
    assert [{name: answer[name] for name in table[0]} for answer in answers] == table
    reference = tmp_path / "reference.jsonl"
    run(write_table(tmp_path / "reference_in.jsonl", table), reference)
    for answer, expected in zip(answers, read_back(reference), strict=True):
        assert (answer["error"] or None) == expected["error"]
        assert (answer["label"] or None) == expected["label"]
        detail = answer["detail"] if output_kind == "jsonl" else json.loads(answer["detail"] or "null")
        assert detail == expected["detail"]
        probabilities = answer["probabilities"]
        if output_kind in ("csv", "tsv"):
            probabilities = json.loads(probabilities or "null")
        assert probabilities == expected["probabilities"]


def test_csv_values_stay_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(b'\xef\xbb\xbfid,text,n\r\n007,"a\r\nb",1.10\r\n\r\n"",x, y \r\n')
    output = tmp_path / "out.csv"
    run(source, output)
    lines = output.read_bytes()
    assert lines.startswith(b"id,text,n,label,")
    assert b'\n007,"a\r\nb",1.10,' in lines
    assert b'\n,x," y ",' in lines


def test_jsonl_rows_keep_their_text(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [
        '{"text": "a", "n": 12345678901234567890123, "x": 1.10, "deep": {"b": [1, {"c": null}], "a": 1e5}}',
        '  {"z":"\\u00e9", "text":"b"}\r',
        "{}",
        '{"text": "c", "text": "d"}',
    ]
    source.write_text("\n".join(lines) + "\n\n", newline="")
    output = tmp_path / "out.jsonl"
    run(source, output)
    written = output.read_text().splitlines()
    for line, answer in zip(lines, written, strict=True):
        assert answer.startswith(line.strip()[:-1])
    assert written[2].startswith('{"label": null')
    assert json.loads(written[3])["detail"]["text"] == "d"


def test_bad_json_lines_get_errors_and_spoil_nothing(tmp_path: Path) -> None:
    bad = ["[1]", "{oops", '"text"', '{"text": NaN}', '{"text": "\\ud800"}', "{" + '"a":[' * 100000, "null"]
    good = '{"text": "fine"}'
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{line}\n{good}\n" for line in bad))
    for kind in FORMATS:
        output = tmp_path / f"out.{kind}"
        summary = run(source, output, window_rows=3)
        assert summary.counts.errors == {"bad_json": len(bad)}
        answers = read_back(output)
        assert [answer["error"] or "" for answer in answers[1::2]] == [""] * len(bad)
        assert all(str(answer["error"]).startswith("bad_json: ") for answer in answers[::2])
        assert [answer["bad_line"] for answer in answers[::2]] == bad


def test_parquet_keeps_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b", None]),
            "when": pa.array([1, None, 3], pa.timestamp("ns", "UTC")),
            "day": pa.array([datetime.date(2024, 1, 2), None, None]),
            "price": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("2.00")]),
            "word": pa.array(["x", "y", "x"]).dictionary_encode(),
            "raw": pa.array([b"\x00\xff", None, b""]),
            "nested": pa.array([{"a": [1, 2], "t": datetime.datetime(2024, 1, 2)}, None, {"a": None, "t": None}]),
            "small": pa.array([1, 2, None], pa.int8()),
            "nan": pa.array([float("nan"), 1.5, None]),
            "large": pa.array(["x", None, "y"], pa.large_string()),
            "tags": pa.array([["x"], ["y", "x"], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
            "single": pa.array([0.1, -0.0, None], pa.float32()),
            "pair": pa.array([[datetime.date(2024, 1, 2)] * 2, None, None], pa.list_(pa.date32(), 2)),
        }
    )
    source = tmp_path / "in.parquet"
    pq.write_table(table, source, row_group_size=2)
    read = pq.read_table(source)
    run(source, tmp_path / "out.parquet", window_rows=2)
    output = pq.read_table(tmp_path / "out.parquet")
    for name in set(read.column_names) - {"nan"}:
        assert output.column(name).equals(read.column(name)), name
    assert [output.schema.field(name).type for name in read.column_names] == [field.type for field in read.schema]
    run(source, tmp_path / "out.jsonl")
    first, second, _ = read_back(tmp_path / "out.jsonl")
    assert first["when"].startswith("1970-01-01 00:00:00.000000001")
    assert (first["day"], first["price"], first["word"], first["raw"]) == ("2024-01-02", "1.10", "x", "AP8=")
    assert first["nested"]["a"] == [1, 2]
    assert (first["tags"], first["single"], first["pair"]) == (["x"], 0.1, ["2024-01-02"] * 2)
    assert first["nan"] is None
    assert (second["nan"], second["nested"], second["small"]) == (1.5, None, 2)
    run(source, tmp_path / "out.csv")
    assert read_back(tmp_path / "out.csv")[0]["nan"] == "nan"


def test_jsonl_to_parquet_finds_types(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    values = [
        {"text": "a", "i": 1, "f": 1, "b": True, "l": [], "o": {"x": 1}, "none": None, "big": 2**63},
        {"text": "b", "f": 0.5, "l": [1, None], "o": {"y": "s"}, "late": "z"},
    ]
    source.write_text("".join(json.dumps(value) + "\n" for value in values))
    run(source, tmp_path / "out.parquet", window_rows=1)
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.field("i").type == pa.int64()
    assert schema.field("f").type == pa.float64()
    assert schema.field("b").type == pa.bool_()
    assert schema.field("l").type == pa.list_(pa.int64())
    assert schema.field("o").type == pa.struct([("x", pa.int64()), ("y", pa.string())])
    assert schema.field("none").type == pa.string()
    assert schema.field("big").type == pa.uint64()
    assert pq.read_table(tmp_path / "out.parquet").column("late").to_pylist() == [None, "z"]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"a": 1}, {"a": "x"}, ["'a'", "integer in row 1", "string in row 2", "write JSONL"]),
        ({"a": [1]}, {"a": [{"b": 1}]}, ["'a[]'", "integer", "object"]),
        ({"a": {"b": True}}, {"a": {"b": 1.5}}, ["'a.b'", "bool", "number"]),
        ({"a": 2**60}, {"a": 0.5}, ["'a'", "2^53", "row 1", "row 2"]),
        ({"a": 2**70}, {}, ["'a'", "64 bits", "row 1"]),
        ({"a": {}}, {}, ["'a'", "empty objects"]),
    ],
)
def test_types_that_do_not_unite_are_named(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], words: list[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": "t", **row}) + "\n" for row in (first, second)))
    with pytest.raises(InputError) as caught:
        run(source, tmp_path / "out.parquet")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out.parquet.parts").exists()
    run(source, tmp_path / "out.jsonl")
    run(source, tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"text\n", ["no rows"]),
        (b"text,text\na,b\n", ["'text'", "more than once"]),
        (b"text,n\na,1\nb\n", ["row 2", "line 3", "1 field,", "2"]),
        (b"text,n\na,1,2\n", ["row 1", "3 fields"]),
        (b'text\n"open\n', ["not CSV", "quote"]),
        (b'text\n"a"b\n', ["not CSV"]),
        (b"text,n\ra,1\r", ["not CSV", "carriage return"]),
        (b"text\nok\ncaf\xe9\n", ["not UTF-8", "0xe9", "offset 11", "line 3"]),
        ("text\nx\n".encode("utf-16"), ["UTF-16"]),
        (gzip.compress(b"text\nx\n", mtime=0), ["gzip", ".gz"]),
        (b"PK\x03\x04\xff\xff", ["Excel"]),
        (b"PAR1\xff\xff", ["--format parquet"]),
    ],
)
def test_csv_that_cannot_be_read_is_explained(tmp_path: Path, content: bytes, words: list[str]) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_for(source, Path("out.csv"))
    for word in [str(source), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('[{"text": "a"}]\n', "a JSON list"),
        ('{\n"text": "a"\n}\n', "is not JSON"),
        ("text\na\n", "is not JSON"),
        ('{"text": NaN}\n', "NaN is not a JSON number"),
    ],
)
def test_jsonl_without_an_object_is_refused(tmp_path: Path, content: str, why: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    with pytest.raises(InputError, match=f"not one of its lines is a JSON object.*{why}"):
        open_for(source, Path("out.jsonl"))


def test_huge_field_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_prefill.jobs.tables.csv_table.MAX_FIELD_CHARS", 1000)
    source = tmp_path / "in.csv"
    source.write_text("text\n" + "x" * 2000 + "\n")
    with pytest.raises(InputError, match="larger than field limit"):
        open_for(source, Path("out.csv"))
    monkeypatch.setattr("moe_prefill.jobs.tables.lines.MAX_LINE_BYTES", 1000)
    with pytest.raises(InputError, match=r"longer than 1,000 bytes|larger"):
        open_for(source, Path("out.csv"))


def test_shards_of_a_directory_come_in_order_of_their_names(tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    directory.mkdir()
    (directory / "b.csv").write_text("text,id\n3,b\n")
    (directory / "a.csv").write_text("id,text\na,1\na,2\n")
    with gzip.open(directory / "c.csv.gz", "wt") as file:
        file.write("id,text\nc,4\n")
    (directory / "_SUCCESS").write_text("")
    (directory / ".hidden.csv").write_text("x\n")
    (directory / "notes.txt").write_text("")
    for source in (directory, f"{directory}/*.csv*"):
        table = open_for(source, Path("out.csv"))
        assert [path.name for path in table.files] == ["a.csv", "b.csv", "c.csv.gz"]
        batches = list(table.read(0, [1, 3]))
        assert [row["text"] for batch in batches for row in batch.rows] == ["1", "2", "3", "4"]
        assert table.columns == ("id", "text")


def test_shards_that_disagree_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,2\n")
    (tmp_path / "b.csv").write_text("id,words\n1,2\n")
    with pytest.raises(InputError, match=r"b\.csv.*missing \['text'\].*additional \['words'\]"):
        open_for(tmp_path, Path("out.csv"))
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": ["1"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet.*'n' is string.*int64"):
        open_for(f"{tmp_path}/*.parquet", Path("out.csv"))
    with pytest.raises(InputError, match="several formats"):
        open_for(tmp_path, Path("out.csv"))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_for(tmp_path / ("x" * 300 + ".csv"), Path("out.csv"))
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match="is a pipe or a device"):  # opening it would wait for ever
        open_for(tmp_path / "pipe.csv", Path("out.csv"))
    with pytest.raises(InputError, match="no such file"):
        find_files(str(tmp_path / "none.csv"))
    with pytest.raises(InputError, match="no file matches"):
        find_files(str(tmp_path / "*.csv"))
    with pytest.raises(InputError, match="no file ending in"):
        find_files(str(tmp_path))
    with pytest.raises(InputError, match="give --format"):
        choose_format([tmp_path / "x.data"], None)
    with pytest.raises(UsageError, match="csv, tsv, jsonl, parquet"):
        choose_format([tmp_path / "x.data"], "xml")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"broken\.parquet: cannot be read as Parquet"):
        open_for(broken, Path("out.csv"))
    truncated = tmp_path / "t.csv.gz"
    truncated.write_bytes(gzip.compress(b"text\n" + bytes(range(48, 58)) * 5000)[:-20])
    with pytest.raises(InputError, match="cannot be read beyond"):
        open_for(truncated, Path("out.csv"))


@pytest.mark.parametrize("kind", FORMATS)
def test_reading_from_any_mark_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    table = rows(40)
    for name, part in (("a", table[:13]), ("b", table[13:14]), ("c", table[14:])):
        write_table(tmp_path / f"{name}.{kind}", part)
    opened = open_for(f"{tmp_path}/*.{kind}", Path("out.csv"), window_rows=3, limit=38)
    assert opened.num_rows == 38
    for mark in range(len(opened.marks)):
        first = opened.marks.rows[mark]
        batches = list(opened.read(mark, [2, 36 - first] if first < 36 else [38 - first]))
        found = [row for batch in batches for row in batch.rows]
        assert found == table[first:38]


text = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(text, text.filter(bool)), min_size=1, max_size=8))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    lines = ["a,b", *(",".join(map(csv_field, pair)) for pair in values)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    table = CsvTable([path], limit=None, granule_rows=1)
    found = [tuple(row.values()) for batch in table.read(0, [len(values)]) for row in batch.rows]
    assert found == values
    assert [tuple(row) for row in csv.reader(io.StringIO(path.read_bytes().decode(), newline=""))][1:] == values


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(text, json_values, max_size=4), min_size=1, max_size=5))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "t.jsonl"
    path.write_text("".join(json_text(value) + "\n" for value in values), encoding="utf-8", newline="")
    table = JsonlTable([path], limit=None, granule_rows=1)
    batch = next(table.read(0, [len(values)]))
    assert batch.rows == values
    assert not batch.errors


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_input_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, kind: str) -> None:
    source = write_table(tmp_path / f"in.{kind}", rows(20))
    table = open_for(source, Path("out.csv"))
    write_table(source, rows(5))
    with pytest.raises(InputError, match="became shorter while it was read; run the job again"):
        list(table.read(0, [20]))
