"""Settings from flags, environment and file; keys; warm-up; the description of the API."""

import subprocess
import sys
from contextlib import closing

import pytest

from moe_prefill.cli import main
from moe_prefill.config import EngineConfig
from moe_prefill.core import NOT_KEPT
from moe_prefill.errors import MoePrefillError, PlanError, RowError, TaskError, UsageError
from moe_prefill.server import warmup
from moe_prefill.server.keys import Keys, new_key
from moe_prefill.server.pace import Pace
from moe_prefill.server.refusals import Refused
from moe_prefill.server.run import bind, model_names, prepare
from moe_prefill.server.settings import ServerConfig, read_settings
from moe_prefill.server.warmup import warm_up

from .conftest import MODEL
from .helpers import FakeEngine


@pytest.fixture
def file_of(tmp_path):
    def write(text):
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_win_over_environment_over_file_over_defaults(file_of):
    path = file_of(
        '[server]\nport = 1\nhost = "a"\nmax_wait_ms = 5\nserved_model_name = ["x", "y"]\n[engine]\nmodel = "m"'
    )
    environment = {"MOE_PREFILL_PORT": "2", "MOE_PREFILL_HOST": "b", "MOE_PREFILL_PRUNE_LAST": "false", "OTHER": "x"}
    server, engine = read_settings({"port": 3}, environment, path)
    assert (server.port, server.host, server.max_wait_ms, server.max_rows) == (3, "b", 5.0, ServerConfig().max_rows)
    assert server.served_model_name == ("x", "y")
    assert (engine.model, engine.prune_last) == ("m", False)


@pytest.mark.parametrize(
    ("flags", "environment", "text"),
    [
        ({}, {}, "[server]\nprot = 1"),
        ({}, {}, "[sever]\nport = 1"),
        ({}, {}, "port = 1"),
        ({}, {}, "server = 1"),
        ({}, {}, '[server]\nport = "1"'),
        ({}, {}, "[server]\nport = true"),
        ({}, {}, "not toml"),
        ({}, {"MOE_PREFILL_PORT": "x"}, ""),
        ({}, {"MOE_PREFILL_PRUNE_LAST": "maybe"}, ""),
        ({"port": 70000}, {}, ""),
        ({"max_sweep_s": 0.0}, {}, ""),
        ({"default_max_tokens": 2}, {}, ""),
        ({"warmup": "full"}, {}, ""),
        ({"tenant_share": 2.0}, {}, ""),
        ({"drain_seconds": -1.0}, {}, ""),
        ({"gpus": -1}, {}, ""),
    ],
)
def test_what_is_wrong_is_said_at_the_start(file_of, flags, environment, text):
    with pytest.raises(UsageError):
        read_settings({"model": "m", **flags}, environment, file_of(text))


def test_a_taken_port_is_found_before_the_model_is_loaded():
    with closing(bind("127.0.0.1", 0)) as listener:
        listener.listen()
        with pytest.raises(UsageError, match="in use"):
            bind("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(UsageError):
        bind("no.such.host.invalid", 0)


def test_a_model_is_needed():
    with pytest.raises(UsageError, match="model"):
        read_settings({}, {}, None)


def test_a_model_is_called_by_its_whole_or_last_name():
    assert model_names("org/name") == ("org/name", "name")
    assert model_names("name") == ("name",)


def test_tasks_are_checked_before_the_model_is_loaded(file_of):
    engine = EngineConfig(model=str(MODEL))
    for text in ('task = "rank"\ncandidates = ["a"]', 'task = "classify"\nlabels = ["a", "b"]', 'task = "rank"\nx = 1'):
        with pytest.raises(TaskError):
            prepare(ServerConfig(rerank_task=file_of(text)), engine)
    with pytest.raises(MoePrefillError):
        prepare(ServerConfig(classify_task=file_of('task = "classify"\nlabels = ["a", "a"]')), engine)
    prepare(ServerConfig(rerank_task=file_of('task = "rank"\ncandidates_column = "d"\ntext_column = "q"')), engine)


def test_keys_are_read_by_their_hashes(file_of):
    key, entry = new_key('a "quoted" \\ name')
    keys = Keys.read(file_of(entry))
    assert keys.caller(f"Bearer {key}").tenant == 'a "quoted" \\ name'
    with pytest.raises(Refused):
        keys.caller("Bearer " + key[:-1])
    for wrong in ("", "[[keys]]", '[[keys]]\ntenant = "a"\nsha256 = "abc"', "keys = 1"):
        with pytest.raises(UsageError):
            Keys.read(file_of(wrong))


def test_the_warm_up_computes_the_largest_call_and_learns_the_pace():
    engine, pace = FakeEngine(max_request=300), Pace(0.001)
    warm_up(engine, [pace], "limit")
    assert max(len(request.tokens) for call in engine.calls for request in call) == 300
    assert {request.salt for call in engine.calls for request in call} == {NOT_KEPT}, "the pool stays empty"
    assert pace.tokens_per_s > 0
    count = len(engine.calls)
    warm_up(engine, [pace], "off")
    assert len(engine.calls) == count


def test_the_warm_up_learns_what_the_smallest_call_takes(monkeypatch):
    monkeypatch.setattr(warmup, "_compute", lambda engine, lengths: 1.0 + sum(lengths) / 1000)
    pace = Pace(0.05)
    warm_up(FakeEngine(), [pace], "small")
    assert pace.fixed_s == 1.064
    assert pace.call_s == 2 * 1.064


def test_a_warm_up_that_fails_is_an_error():
    engine = FakeEngine()
    engine._one = lambda request: RowError("too_long", "no room")
    with pytest.raises(PlanError, match="no room"):
        warm_up(engine, [Pace(1.0)], "small")


def test_the_server_needs_no_torch_and_the_command_says_what_is_missing(monkeypatch, capsys):
    code = "import sys, moe_prefill.server.run, moe_prefill.server.runbatch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--model", str(MODEL)]) == UsageError.exit_code
    assert "moe-prefill[server]" in capsys.readouterr().err
