"""What is shipped beside the code says what the code does: dashboard, compose file, status page."""

import json
import re
import shutil
import subprocess

import httpx
import pytest
import yaml

from moe_prefill.server.settings import read_settings

from .conftest import ROOT
from .helpers import listening

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_the_dashboard_asks_for_metrics_that_there_are(make_service):
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:moe_prefill|te)_\w+", query)}
    with listening(make_service()) as url:
        httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1})
        httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        text = httpx.get(f"{url}/metrics").text
    told = set(re.findall(r"^(\w+)", text, re.MULTILINE))
    not_on_this_engine = {"moe_prefill_mfu"}  # needs a peak and busy time
    assert asked - told <= not_on_this_engine
    assert len(asked) > 10


def test_the_compose_file_names_settings_that_there_are():
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["scoring"]
    environment = dict.fromkeys(service["environment"], "1")
    server, engine = read_settings({}, {**environment, "MOE_PREFILL_PORT": "8000"}, None)
    assert (server.api_keys, engine.model) == ("1", "1")
    assert int(service["stop_grace_period"].removesuffix("s")) > server.drain_seconds


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_status_page_shows_the_state_in_a_browser(make_service):
    with listening(make_service()) as url:
        httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
        page = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True).stdout
    assert '<span id="state" class="ready">ready</span>' in page
    assert "max_tokens_missing" in page
    assert "tokens wait" in page
