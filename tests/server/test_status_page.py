"""The status page as a browser shows it, and what it tells of the workers."""

import shutil
import subprocess

import httpx
import pytest

from moe_prefill.core import RunStats, WorkerState

from .helpers import FakeEngine, listening

BODY = {"prompt": "The sky is blue", "max_tokens": 1, "logprobs": 1}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Reporting(FakeEngine):
    """Says of itself what two workers would say."""

    def worker_states(self):
        stats = RunStats(busy_s=4.0, exposed_s=1.0, computed_tokens=500)
        return [
            WorkerState(
                rank=0,
                alive=True,
                load_flops=3 * 10**12,
                saturation_flops=4 * 10**12,
                residency={"resident": 20, "sharded": 28},
                stats=stats,
            ),
            WorkerState(rank=1, alive=False, load_flops=0, saturation_flops=None, residency={}, stats=RunStats()),
        ]


@pytest.fixture
def reporting(tokenizer):
    return Reporting(vocab_size=tokenizer.vocab_size)


def test_metrics_and_status_tell_of_each_worker(make_service, reporting):
    with listening(make_service(reporting)) as url, httpx.Client(base_url=url) as http:
        text, rows = http.get("/metrics").text, http.get("/status.json").json()["workers"]
    for line in (
        'moe_prefill_worker_load_flops{worker="0"} 3',
        'moe_prefill_worker_load_ratio{worker="0"} 0.75',
        'moe_prefill_worker_exposed_ratio{worker="0"} 0.25',
        'moe_prefill_worker_layers{residency="sharded",worker="0"} 28.0',
        'moe_prefill_worker_alive{worker="1"} 0.0',
    ):
        assert line in text
    assert 'load_ratio{worker="1"}' not in text, "without T there is no ratio"
    assert (rows[0]["load_ratio"], rows[0]["exposed_share"], rows[1]["load_ratio"]) == (0.75, 0.25, None)


def test_an_engine_that_says_nothing_is_one_worker(make_service, tokenizer):
    engine = FakeEngine(vocab_size=tokenizer.vocab_size)
    with listening(make_service(engine)) as url, httpx.Client(base_url=url) as http:
        http.post("/v1/completions", json=BODY)
        (row,) = http.get("/status.json").json()["workers"]
    assert (row["rank"], row["alive"], row["load_flops"], row["saturation_flops"]) == (0, True, 0, None)
    assert row["stats"]["computed_tokens"] == engine.stats.computed_tokens


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_shows_the_page(make_service, reporting, tmp_path):
    with listening(make_service(reporting)) as url, httpx.Client(base_url=url) as http:
        http.post("/v1/completions", json=BODY)
        http.post("/v1/completions", json={"prompt": "my secret"})
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        command += ["--virtual-time-budget=3000", "--dump-dom", f"{url}/"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert '<span id="state" class="ready">ready</span>' in shown
    for told in ("20 resident, 28 sharded", "0.75", "25 %", "lost", "max_tokens_missing", "MFU while busy"):
        assert told in shown, shown
    assert "my secret" not in shown
