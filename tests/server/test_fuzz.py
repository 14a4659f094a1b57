"""Whatever is sent: a typed error of the client's, never one of the server's, and the server lives on."""

import asyncio
import json
import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_prefill.server.app import HttpLimits, make_app
from moe_prefill.server.context import Context
from moe_prefill.server.endpoints import BY_PATH
from moe_prefill.server.metrics import Metrics
from moe_prefill.server.run import assemble
from moe_prefill.server.settings import ServerConfig
from moe_prefill.tasks import ClassifyConfig, Label
from moe_prefill.text import Tokenizer

from .conftest import MODEL
from .helpers import FakeEngine

EXAMPLES = 400 if os.environ.get("MOE_PREFILL_LONG") else 25

TEXT = st.text(max_size=12) | st.sampled_from(["", " ", "Yes", "<|im_end|>", "{text}", "{", "\x00", "\U0001f600"])
NUMBER = st.integers(-(2**70), 2**70) | st.integers(-2, 3) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def app():
    tokenizer = Tokenizer.from_directory(MODEL)
    engine = FakeEngine(vocab_size=tokenizer.vocab_size, max_request=256)
    context = Context(
        tokenizer=tokenizer,
        limits=engine.limits,
        names=("demo",),
        classify=ClassifyConfig(labels=(Label(name="spam"), Label(name="ham"))),
    )
    service, _ = assemble(ServerConfig(max_rows=16, max_wait_ms=0), engine, context, None)
    service.scheduler.start()
    yield make_app(service, Metrics(service.scheduler), None, HttpLimits())
    service.close()


def post(app, path, content):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post(path, content=content)

    return asyncio.run(go())


def fields_of(endpoint):
    return sorted({name for form in endpoint.forms for name in form.body.model_fields})


@st.composite
def bodies(draw, endpoint):
    """A valid body with some fields replaced, added or left out."""
    body = dict(draw(st.sampled_from([form.example for form in endpoint.forms])))
    for name in draw(st.lists(st.sampled_from(fields_of(endpoint)), max_size=3)):
        body[name] = draw(JSON | st.lists(TEXT, max_size=3) | st.lists(st.integers(0, 400), max_size=5))
    for name in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)):
        del body[name]
    return body


def check(reply):
    assert reply.status_code < 500, reply.text
    told = reply.json()
    if reply.status_code == 200:
        assert "NaN" not in reply.text
        return
    assert reply.status_code in (400, 404, 413, 422), reply.text
    error = told["error"]
    assert told["error_type"] if isinstance(error, str) else error["code"] and error["message"]


@pytest.mark.parametrize("path", list(BY_PATH))
def test_examples_are_answered(app, path):
    for form in BY_PATH[path].forms:
        reply = post(app, path, json.dumps(form.example))
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("path", list(BY_PATH))
def test_any_body_is_answered_or_refused(app, path):
    endpoint = BY_PATH[path]

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(endpoint) | JSON)
    def run(body):
        check(post(app, path, json.dumps(body)))

    run()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=64))
def test_any_bytes_are_refused(app, content):
    check(post(app, "/v1/completions", content))


def test_the_described_api_has_no_server_errors(app):
    """schemathesis draws requests from our own description, of every operation."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= set(BY_PATH)
    statuses = set()
    for operation in operations:

        @settings(max_examples=max(4, EXAMPLES // 5), deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def run(case):
            reply = case.call()
            statuses.add(reply.status_code)
            assert reply.status_code < 500, (case.path, reply.text)

        run()
    assert 200 in statuses
