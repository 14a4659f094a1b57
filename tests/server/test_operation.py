"""Limits, keys, tenants, drain, clients that leave: with a fake engine that stands still when told."""

import asyncio
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moe_prefill.errors import WorkerError
from moe_prefill.server.app import HttpLimits
from moe_prefill.server.keys import Keys, new_key
from moe_prefill.server.logs import JsonLines
from moe_prefill.server.tracing import OpenTelemetry

from .helpers import FakeEngine, listening

BODY = {"prompt": "The sky is blue", "max_tokens": 1, "logprobs": 1}


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.toml"
    made = [new_key(tenant) for tenant in ("red", "blue", "red")]
    path.write_text("\n".join(entry for _, entry in made))
    assert all(key not in path.read_text() for key, _ in made), "only hashes are kept"
    return Keys.read(str(path)), [{"Authorization": f"Bearer {key}"} for key, _ in made]


def test_overload_gives_429_and_nothing_else(make_service, tokenizer):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    engine.gate.clear()
    service = make_service(engine, max_queue_requests=8)
    with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(40) as pool:
        replies = [pool.submit(http.post, "/v1/completions", json=BODY) for _ in range(40)]
        wait_for(lambda: sum(reply.done() for reply in replies) == 32)
        engine.gate.set()
        statuses = [reply.result().status_code for reply in replies]
        refused = [reply.result() for reply in replies if reply.result().status_code == 429]
    assert sorted(statuses) == [200] * 8 + [429] * 32
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


def test_a_queue_full_of_tokens_refuses_too(make_service, tokenizer):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size, max_request=64)
    engine.gate.clear()
    service = make_service(engine, max_queue_tokens=70)
    body = {"prompt": [list(range(1, 61))], "max_tokens": 1}
    with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(4) as pool:
        first = pool.submit(http.post, "/v1/completions", json=body)
        wait_for(lambda: len(engine.calls) == 1)
        second = pool.submit(http.post, "/v1/completions", json=body)
        wait_for(lambda: service.scheduler.queued("interactive")[0] == 1)
        assert http.post("/v1/completions", json=body).status_code == 429
        two = {"prompt": [[index, *range(1, 61)] for index in range(2)], "max_tokens": 1}
        assert http.post("/v1/completions", json=two).status_code == 413, "it would never fit"
        engine.gate.set()
        assert first.result().status_code == second.result().status_code == 200


def test_work_of_a_client_that_left_is_not_computed(make_service, tokenizer):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    engine.gate.clear()
    service = make_service(engine)
    with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(2) as pool:
        first = pool.submit(http.post, "/v1/completions", json=BODY)
        wait_for(lambda: len(engine.calls) == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": "Gone"}, timeout=0.3)
        wait_for(lambda: len(service.permits) == 1)
        engine.gate.set()
        assert first.result().status_code == 200
        assert http.post("/v1/completions", json=BODY).status_code == 200
    assert sum(map(len, engine.calls)) == 2, "the one who left was taken out of the queue"


def test_drain_answers_what_is_queued_and_refuses_what_comes(make_service, tokenizer):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    engine.gate.clear()
    service = make_service(engine)
    with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(http.post, "/v1/completions", json=BODY) for _ in range(4)]
        wait_for(lambda: len(service.permits) == 4)
        drained = threading.Thread(target=service.drain, args=(30,))
        drained.start()
        wait_for(lambda: service.scheduler.state == "draining")
        late = http.post("/v1/completions", json=BODY)
        assert (late.status_code, http.get("/ready").status_code, http.get("/health").status_code) == (503, 503, 200)
        assert [http.head(path).status_code for path in ("/ready", "/health")] == [503, 200]
        assert "retry-after" in late.headers
        engine.gate.set()
        drained.join()
        assert [reply.result().status_code for reply in replies] == [200] * 4


def test_what_is_not_served_in_time_gets_503(make_service, tokenizer):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    engine.gate.clear()
    service = make_service(engine)
    with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(8) as pool:
        first = pool.submit(http.post, "/v1/completions", json=BODY)
        wait_for(lambda: len(engine.calls) == 1)
        queued = [pool.submit(http.post, "/v1/completions", json=BODY) for _ in range(3)]
        wait_for(lambda: service.scheduler.queued("interactive")[0] == 3)
        assert service.scheduler.drain(0) == 3
        for reply in queued:
            assert reply.result().status_code == 503
            assert "retry-after" in reply.result().headers
        engine.gate.set()
        assert first.result().status_code == 200


def test_a_lost_engine_is_told_and_unhealthy(make_service, tokenizer, caplog):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    service = make_service(engine)
    with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http:
        engine.fail_with = RuntimeError("secret prompt text")
        broken = http.post("/v1/completions", json=BODY)
        assert broken.status_code == 500
        assert "secret" not in broken.text
        assert "secret" not in "".join(JsonLines().format(record) for record in caplog.records)
        engine.fail_with = WorkerError("worker 1 is gone")
        assert http.post("/v1/completions", json=BODY).status_code == 503
        assert http.get("/health").status_code == 503
        assert http.post("/v1/completions", json=BODY).status_code == 503


def test_no_key_and_wrong_keys_are_refused_everywhere(make_service, keys):
    known, headers = keys
    with listening(make_service(keys=known), known) as url, httpx.Client(base_url=url) as http:
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic !!"}, {"Authorization": "x"}):
            for path in ("/v1/completions", "/rerank", "/v1/classify", "/tokenize"):
                assert http.post(path, json=BODY, headers=wrong).status_code == 401
            assert http.get("/v1/models", headers=wrong).status_code == 401
        for right in headers:
            assert http.post("/v1/completions", json=BODY, headers=right).status_code == 200
        assert http.get("/health").status_code == 200


def test_tenants_share_no_prefix_and_keys_of_one_tenant_do(make_service, keys, tokenizer):
    known, headers = keys
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    with listening(make_service(engine, keys=known), known) as url, httpx.Client(base_url=url) as http:
        for right in headers:
            http.post("/v1/completions", json=BODY, headers=right)
        http.post("/v1/completions", json={**BODY, "cache_salt": "mine"}, headers=headers[0])
    red, blue, again, salted = [call[0].salt for call in engine.calls]
    assert red == again
    assert len({red, blue, salted}) == 3
    assert "red" not in red


def test_status_page_and_metrics_are_for_loopback_or_keys(make_service, keys):
    known, headers = keys
    with listening(make_service(keys=known), known) as url, httpx.Client(base_url=url) as http:
        for path in ("/", "/status.json", "/metrics"):
            assert http.get(path).status_code == 200, "loopback"
            forwarded = {"X-Forwarded-For": "203.0.113.9"}
            assert http.get(path, headers=forwarded).status_code == 401, "through a proxy"
            assert http.get(path, headers={**forwarded, **headers[0]}).status_code == 200
    with listening(make_service()) as url:
        assert httpx.get(f"{url}/metrics", headers={"Forwarded": "for=203.0.113.9"}).status_code == 403


def test_metrics_count_and_the_page_needs_nothing_else(make_service):
    with listening(make_service()) as url, httpx.Client(base_url=url) as http:
        reply = http.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine-1"})
        assert reply.headers["x-request-id"] == "mine-1"
        assert int(reply.headers["x-compute-tokens"]) == reply.json()["usage"]["prompt_tokens"]
        http.post("/v1/completions", json={"prompt": "secret"})
        text = http.get("/metrics").text
        status = http.get("/status.json").json()
        page = http.get("/")
    assert 'moe_prefill_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert 'moe_prefill_errors_total{code="max_tokens_missing"} 1.0' in text
    for name in ("te_request_count 2.0", "te_request_success 1.0", "te_queue_size 0.0", "te_batch_next_tokens_sum"):
        assert name in text
    assert status["requests"]["errors"] == {"max_tokens_missing": 1}
    assert status["recent_errors"][0]["code"] == "max_tokens_missing"
    assert "secret" not in text + json.dumps(status)
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "src=" not in page.text


def test_large_compressed_broken_and_slow_bodies_are_refused(make_service):
    limits = HttpLimits(payload_bytes=1000, body_timeout_s=0.3)
    with listening(make_service(), limits=limits) as url, httpx.Client(base_url=url) as http:
        assert http.post("/v1/completions", content=b"x" * 1001).status_code == 413
        assert http.post("/v1/completions", content=iter([b"x" * 600] * 2)).status_code == 413
        zipped = http.post("/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
        assert zipped.status_code == 415
        for broken in (
            b"",
            b"{",
            b"[1]",
            b'{"prompt": NaN}',
            b"\xff",
            b"[" * 900,
            b'{"prompt": "\\ud800"}',
            b"1" * 900,
        ):
            reply = http.post("/v1/completions", content=broken)
            assert reply.status_code == 400, broken
            assert reply.json()["error"]["code"]
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            assert b" 408 " in slow.recv(100)
        with socket.create_connection((host, int(port))) as flood:
            flood.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(20_000)))
            assert b" 400 " in flood.recv(100)
        assert http.post("/v1/completions", json=BODY).status_code == 200


def test_bodies_are_bounded_together(make_service, tokenizer):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    engine.gate.clear()
    size = len(json.dumps(BODY).encode()) + 100
    limits = HttpLimits(all_bodies_bytes=2 * size)
    service = make_service(engine)
    with listening(service, limits=limits) as url, ThreadPoolExecutor(3) as pool:

        def post():
            return httpx.post(f"{url}/v1/completions", content=json.dumps(BODY).ljust(size), timeout=60)

        two = [pool.submit(post) for _ in range(2)]
        wait_for(lambda: len(service.permits) == 2)
        assert post().status_code == 429
        engine.gate.set()
        assert [reply.result().status_code for reply in two] == [200, 200]


def test_unknown_paths_and_methods_have_the_same_form_of_error(make_service):
    with listening(make_service()) as url, httpx.Client(base_url=url) as http:
        assert http.get("/nothing").json()["error"]["code"] == "not_found"
        assert "/v1/embeddings" in http.post("/v1/embeddings", json={}).json()["error"]["message"]
        assert "--data-dir" in http.get("/v1/batches/batch_1").json()["error"]["message"]
        assert http.get("/v1/completions").status_code == 405
        assert http.post("/../../etc/passwd").status_code == 404


def test_logs_are_json_without_prompts(make_service, caplog):
    caplog.set_level(logging.INFO, "moe_prefill.server.access")
    with listening(make_service()) as url:
        httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": "my secret"})
        httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": ["my secret", 1]})
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if hasattr(record, "facts")]
    assert [line["status"] for line in lines] == [200, 400]
    assert all(line["path"] == "/v1/completions" and len(line["request_id"]) == 32 for line in lines)
    assert "secret" not in json.dumps(lines)


def test_traces_have_a_span_a_request_under_the_callers(make_service):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace = "0af7651916cd43dd8448eb211c80319c"
    with listening(make_service(), tracer=OpenTelemetry(provider)) as url:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": "my secret"}, headers=headers)
        httpx.post(f"{url}/v1/completions", json={"prompt": "my secret"})
    good, bad = exporter.get_finished_spans()
    assert (good.name, f"{good.context.trace_id:032x}") == ("/v1/completions", trace)
    assert good.attributes["moe_prefill.prompt_tokens"] > 0
    assert bad.attributes["error.type"] == "max_tokens_missing"
    assert "secret" not in good.to_json() + bad.to_json()


def test_a_cancelled_answer_gives_its_permit_back(make_service, tokenizer):
    from moe_prefill.server.endpoints import BY_PATH

    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    engine.gate.clear()
    service = make_service(engine)
    service.scheduler.start()

    async def cancelled():
        task = asyncio.ensure_future(service.answer(BY_PATH["/v1/completions"], json.dumps(BODY).encode()))
        while not engine.calls:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert len(service.permits) == 0
    engine.gate.set()
    wait_for(lambda: engine.stats.sweeps == 1)
