"""What is shipped beside the code says what the code does: dashboard, compose file."""

import json
import re

import httpx
import yaml

from moe_prefill.server.settings import read_settings

from .conftest import ROOT
from .helpers import listening


def test_the_dashboard_asks_for_metrics_that_there_are(make_service):
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:moe_prefill|te)_\w+", query)}
    with listening(make_service()) as url:
        httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1})
        httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        text = httpx.get(f"{url}/metrics").text
    told = set(re.findall(r"^(\w+)", text, re.MULTILINE))
    # They need a peak and busy time, and an engine that knows its workers.
    not_on_this_engine = {"moe_prefill_mfu", "moe_prefill_worker_load_ratio", "moe_prefill_worker_exposed_ratio"}
    assert asked - told <= not_on_this_engine
    assert len(asked) > 10


def test_the_compose_file_names_settings_that_there_are():
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["scoring"]
    environment = dict.fromkeys(service["environment"], "1")
    server, engine = read_settings({}, {**environment, "MOE_PREFILL_PORT": "8000"}, None)
    assert (server.api_keys, engine.model) == ("1", "1")
    assert int(service["stop_grace_period"].removesuffix("s")) > server.drain_seconds
