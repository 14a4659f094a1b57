"""Batch files by ``run-batch``: asked, stopped and gone on with."""

import json

import pytest

from moe_prefill.errors import InputError, OutputError, UsageError
from moe_prefill.server import runbatch
from moe_prefill.server.endpoints import BY_PATH
from moe_prefill.server.runbatch import check_paths, known_job, run_batch

from .batches import Stopped, StoppingEngine, line
from .conftest import MODEL
from .helpers import FakeEngine

BODIES = {
    path: dict(endpoint.forms[-1].example)
    for path, endpoint in BY_PATH.items()
    if path not in ("/predict", "/classify")
}
BODIES["/classify"] = {"input": ["a"], "labels": ["spam", "ham"]}


def steady(text):
    """Reply lines without what is drawn anew: ids and times."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(entry) for key, entry in value.items() if key not in ("id", "request_id", "created")}
        return value

    return [strip(json.loads(one)) for one in text.splitlines()]


def run(source, output, make_service, engine=None, **options):
    service = make_service(engine)
    known = known_job(source, service.context, options.pop("model", "m"), {})
    options = {"resume": False, "overwrite": False, **options}
    return run_batch(source, output, service.context, service.scheduler.engine, known=known, **options)


def test_every_endpoint_can_be_asked_in_a_batch_and_replies_are_in_order(tmp_path, make_service):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line(f"{index}", body, path) for index, (path, body) in enumerate(BODIES.items())]
    source.write_text("\n".join(lines) + "\n\n")
    done = run(source, output, make_service)
    told = [json.loads(one) for one in output.read_text().splitlines()]
    assert [one["custom_id"] for one in told] == [str(index) for index in range(len(lines))]
    assert [one["response"]["status_code"] for one in told] == [200] * len(lines), told
    assert (done.completed, done.failed) == (len(lines), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_bad_line_has_its_error_and_leaves_the_others_alone(tmp_path, make_service):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = ["{", "[]", line("x", url="/v1/embeddings"), line("", {}), line("y", {"prompt": "a"})]
    source.write_text("\n".join([line("a"), *bad, line("b")]))
    done = run(source, output, make_service)
    told = [json.loads(one) for one in output.read_text().splitlines()]
    assert (done.completed, done.failed) == (2, 5)
    assert [one["response"] and one["response"]["status_code"] for one in told] == [200, *[None] * 4, 400, 200]
    assert all(one["error"]["code"] for one in told[1:5])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path, make_service):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a") + "\r\n" + line("b") + "\r\n", encoding="utf-8-sig")
    assert run(source, output, make_service).completed == 2


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not(tmp_path, make_service, tokenizer, monkeypatch):
    monkeypatch.setattr(runbatch, "_CHUNK_LINES", 4)
    source, output, plain = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "plain.jsonl"))
    source.write_text("\n".join(line(index) if index % 5 else "broken" for index in range(30)))
    run(source, plain, make_service)
    engine = StoppingEngine(3, vocab_size=tokenizer.vocab_size)
    with pytest.raises(Stopped):
        run(source, output, make_service, engine)
    assert not output.exists()
    (tmp_path / ".out.jsonl.part").open("ab").write(b"half a li")  # written, but not in the journal
    engine.left = -1
    done = run(source, output, make_service, engine, resume=True)
    assert done.lines == 30
    assert sum(map(len, engine.calls)) == 24, "what was finished is not computed again"
    assert steady(output.read_text()) == steady(plain.read_text())


def test_a_run_of_other_input_or_settings_is_not_gone_on_with(tmp_path, make_service, tokenizer, monkeypatch):
    monkeypatch.setattr(runbatch, "_CHUNK_LINES", 2)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(line, range(6))))
    engine = StoppingEngine(1, vocab_size=tokenizer.vocab_size)
    with pytest.raises(Stopped):
        run(source, output, make_service, engine)
    with pytest.raises(OutputError, match='weights: "m" there, "other" now'):
        run(source, output, make_service, engine, resume=True, model="other")
    source.write_text("\n".join(map(line, range(7))))
    with pytest.raises(OutputError, match="the rows"):
        run(source, output, make_service, engine, resume=True)
    (tmp_path / ".out.jsonl.batch.json").write_text('{"job": "of an older version"}')
    with pytest.raises(OutputError, match="start anew"):
        run(source, output, make_service, engine, resume=True)


def test_paths_are_checked_before_a_model_is_loaded(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line(1))
    output.write_text("old")
    from pathlib import Path

    for wrong, error in (
        ((Path("https://host/in.jsonl"), output), UsageError),
        ((tmp_path / "none", output), InputError),
        ((source, tmp_path / "none/out"), OutputError),
        ((source, source), OutputError),
        ((source, output), OutputError),
    ):
        with pytest.raises(error):
            check_paths(*wrong, resume=False, overwrite=False)
    check_paths(source, output, resume=False, overwrite=True)


def test_the_command_reads_files_and_settings(tmp_path, tokenizer, monkeypatch, capsys):
    from moe_prefill.cli import main

    made = []
    monkeypatch.setattr("moe_prefill.workers.build_scoring", lambda config: made.append(config) or fake)
    fake = FakeEngine(vocab_size=tokenizer.vocab_size)
    source, output, settings = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "settings.toml"
    source.write_text(line("a", {"prompt": "a"}))
    settings.write_text(f'[server]\ndefault_max_tokens = 1\n[engine]\nmodel = "{MODEL}"\ndtype = "float32"\n')
    command = ["run-batch", "-i", str(source), "-o", str(output), "--config", str(settings)]
    assert main(command) == 0
    assert json.loads(output.read_text())["response"]["status_code"] == 200
    assert json.loads(capsys.readouterr().out)["completed"] == 1
    assert made[0].dtype == "float32"
    assert main(command) == OutputError.exit_code, "the output exists"


def test_another_run_is_refused_before_its_model_is_loaded(tmp_path, tokenizer, monkeypatch, capsys):
    from moe_prefill.cli import main

    monkeypatch.setattr(runbatch, "_CHUNK_LINES", 1)
    monkeypatch.setattr("moe_prefill.workers.build_scoring", lambda config: made.append(config) or engine)
    made, engine = [], StoppingEngine(1, vocab_size=tokenizer.vocab_size, max_sweep=4096)
    source = tmp_path / "in.jsonl"
    source.write_text(line("a", {"prompt": "a", "max_tokens": 1}) + "\n" + line("b", {"prompt": "b", "max_tokens": 1}))
    command = ["run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", str(MODEL)]
    assert main(command) == 70
    for options, told in (
        (["--dtype", "float32"], 'engine.dtype: "bfloat16" there, "float32" now'),
        (["--max-sweep-tokens", "64"], "engine.max_sweep_tokens: 4096 there, 64 now"),
        (["--max-logprobs", "3"], "server.max_logprobs: 20 there, 3 now"),
    ):
        assert main([*command, "--resume", *options]) == OutputError.exit_code
        assert told in capsys.readouterr().err
    assert len(made) == 1, "the model was loaded"
    engine.left = -1
    assert main([*command, "--resume"]) == 0
    assert made[1].max_sweep_tokens == 4096, "the size that the run began with"
