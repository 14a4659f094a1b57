"""A server with batches in the loop of a test, and lines for it."""

import asyncio
import contextlib
import json

import httpx
import openai

from moe_prefill.server.app import HttpLimits, make_app
from moe_prefill.server.batchroutes import add_batch_routes
from moe_prefill.server.batchrunner import BatchRunner
from moe_prefill.server.metrics import Metrics
from moe_prefill.server.store import Store

from .helpers import FakeEngine


def line(custom_id, body=None, url="/v1/completions"):
    body = {"prompt": f"Number {custom_id}", "max_tokens": 1, "logprobs": 1} if body is None else body
    return json.dumps({"custom_id": str(custom_id), "method": "POST", "url": url, "body": body})


@contextlib.asynccontextmanager
async def served(directory, service, keys=None, max_bytes=1 << 20):
    """A client of a server with batches, all in this loop."""
    store = Store(directory)
    app = make_app(service, Metrics(service.scheduler), keys, HttpLimits())
    runner = BatchRunner(store, service, keys.salts if keys is not None else {})
    add_batch_routes(app, runner, max_bytes)
    if service.scheduler.state == "starting":
        service.scheduler.start()
    task = asyncio.ensure_future(runner.run())
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            client.store = store
            yield client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.close()


def sdk(http, key="none"):
    return openai.AsyncOpenAI(base_url="http://server/v1", api_key=key, http_client=http, max_retries=0)


async def ended(client, batch_id):
    for _ in range(2000):
        batch = await client.batches.retrieve(batch_id)
        if batch.status not in ("validating", "in_progress", "finalizing", "cancelling"):
            return batch
        await asyncio.sleep(0.005)
    raise AssertionError(batch)


async def start(client, lines, endpoint="/v1/completions"):
    upload = await client.files.create(file=("../../in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return await client.batches.create(input_file_id=upload.id, endpoint=endpoint, completion_window="24h")


class Stopped(Exception):
    """The run ends here, as by a kill."""


class StoppingEngine(FakeEngine):
    def __init__(self, calls, **settings):
        super().__init__(**settings)
        self.left = calls

    def score(self, requests):
        if self.left == 0:
            raise Stopped
        self.left -= 1
        return super().score(requests)
