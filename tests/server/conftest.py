"""The demo model behind HTTP, once for all tests; and the fake engine with the demo model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from moe_prefill import Engine
from moe_prefill.server.context import Context
from moe_prefill.server.run import assemble
from moe_prefill.server.settings import ServerConfig
from moe_prefill.tasks import load_task_file
from moe_prefill.text import Tokenizer

from .helpers import FakeEngine, listening

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/demo_model/checkpoint"
NAMES = ("demo", str(MODEL))


@pytest.fixture(scope="session")
def engine():
    with Engine(MODEL, dtype="float32", threads=1) as built:
        yield built


@pytest.fixture(scope="session")
def url(engine):
    """The demo model, open to everyone, with a classify task of its own."""
    context = Context(
        tokenizer=engine.tokenizer,
        limits=engine.scoring.limits,
        names=NAMES,
        classify=load_task_file(ROOT / "examples/demo_model/spam.toml"),
    )
    service, _ = assemble(ServerConfig(), engine.scoring, context, None)
    with listening(service) as base:
        yield base
    service.close()


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_directory(MODEL)


@pytest.fixture
def make_service(tokenizer):
    """Services around a fake engine, with ``facts`` of its context; closed at the end of the test."""
    made = []

    def make(engine=None, keys=None, facts=None, **settings):
        engine = engine or FakeEngine(vocab_size=tokenizer.vocab_size)
        context = Context(
            tokenizer=tokenizer,
            limits=engine.limits,
            names=("demo", "*"),
            **(facts or {}),
        )
        service, _ = assemble(ServerConfig(**settings), engine, context, keys)
        made.append((service, engine))
        return service

    yield make
    for service, engine in made:
        if isinstance(engine, FakeEngine):
            engine.gate.set()
        service.close()
