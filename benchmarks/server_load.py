"""What HTTP costs: the demo model behind the server beside the engine alone, the frontend alone, latency, memory.

    python benchmarks/server_load.py --out benchmarks/results/server.json

Clients are threads of this process with persistent connections; the server is a process of its own, its engine with
``--threads`` threads, so on a machine of few cores the clients take from the server's share. Rows are the shipped
mails as classify prompts. Rates are at saturation, engine and server in turn, the median of ``--rounds``. The frontend
alone has an engine that answers at once; over its ``--requests`` requests the growth of its memory is measured.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import http.client
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_prefill import Engine
from moe_prefill.core import AtomicRequest, AtomicResult, EngineLimits, RunStats

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/demo_model/checkpoint"
MAILS = ROOT / "examples/data/mails.csv"
TASK = {"labels": ["spam", "ham"], "template": "Mail:\n{text}\n\nQuestion: Is this mail spam or ham?\nAnswer:"}
SINGLE_CLIENTS = 4
WARM_REQUESTS = 5000  # before memory is read for the first time


class InstantEngine:
    """Answers at once, so that what remains is the frontend."""

    plan_digest = "instant"
    peak_flops = None

    def __init__(self) -> None:
        self.limits = EngineLimits(max_request_tokens=4096, max_sweep_tokens=65536, vocab_size=8192)
        self.stats = RunStats()

    def score(self, requests: Sequence[AtomicRequest]) -> list[AtomicResult | Exception]:
        return [AtomicResult(np.zeros(len(r.ids), np.float32), np.ones(len(r.positions), np.float32)) for r in requests]

    def close(self) -> None: ...


def serve_instant() -> None:
    """The child process that is the frontend alone."""
    import moe_prefill.workers as workers
    from moe_prefill.config import EngineConfig
    from moe_prefill.server.run import serve
    from moe_prefill.server.settings import ServerConfig

    workers.build_scoring = lambda config: InstantEngine()  # type: ignore[assignment]
    serve(ServerConfig(port=0, warmup="off", log_level="info"), EngineConfig(model=str(MODEL)))


@contextmanager
def server(command: Sequence[str]) -> Iterator[tuple[int, int]]:
    """A server process: its port and its process id."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(list(command), stderr=file)
        try:
            while "running on http" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            address = json.loads(next(line for line in log.read_text().splitlines() if "running on http" in line))
            port = int(address["message"].split()[2].rpartition(":")[2])
            while get(port, "/ready") != 200:
                time.sleep(0.05)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> dict[str, Any]:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    told = reply.read()
    assert reply.status == 200, told
    return json.loads(told)  # type: ignore[no-any-return]


def load(port: int, bodies: Sequence[bytes], clients: int, count: int) -> tuple[float, list[float]]:
    """Send ``count`` bodies from ``clients`` threads; seconds in all, and of each request."""
    numbers, times, lock = itertools.count(), [], threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        mine = []
        while (number := next(numbers)) < count:
            begin = time.perf_counter()
            post(connection, "/v1/classify", bodies[number % len(bodies)])
            mine.append(time.perf_counter() - begin)
        with lock:
            times.extend(mine)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin, times


def mails(count: int) -> list[str]:
    with MAILS.open(newline="", encoding="utf-8") as lines:
        return [row["text"] for row in itertools.islice(csv.DictReader(lines), count)]


def bodies_of(texts: Sequence[str], size: int) -> list[bytes]:
    parts = [texts[at : at + size] for at in range(0, len(texts), size)]
    return [json.dumps({"rows": list(part), **TASK}).encode() for part in parts]


def rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def quantile_ms(times: Sequence[float], at: float) -> float:
    return round(1000 * float(np.quantile(times, at)), 2)


def start_batch(port: int, texts: Sequence[str]) -> None:
    """Upload the mails as a batch and start it."""
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/classify", "body": {"rows": [text], **TASK}})
        for i, text in enumerate(texts)
    ]
    head = '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
    head += 'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    form = (head + "\n".join(lines) + "\r\n--b--\r\n").encode()
    connection.request("POST", "/v1/files", form, {"Content-Type": "multipart/form-data; boundary=b"})
    file_id = json.loads(connection.getresponse().read())["id"]
    post(connection, "/v1/batches", json.dumps({"input_file_id": file_id, "endpoint": "/v1/classify"}).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200_000)
    arguments = parser.parse_args()
    texts = mails(arguments.rows)
    report = {**against_engine(arguments, texts), **frontend_only(arguments, texts)}
    report["requests"] = arguments.requests
    report["command"] = " ".join(["python", *sys.argv])
    report["date"] = datetime.date.today().isoformat()
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def against_engine(arguments: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    engine_rates, http_rates, single_rates = [], [], []
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "moe_prefill.cli", "serve", "--model", str(MODEL), "--port", "0"]
        command += ["--threads", str(arguments.threads), "--data-dir", data]
        with server(command) as (port, _), Engine(MODEL, threads=arguments.threads) as engine:
            grouped, single = bodies_of(texts, arguments.items), bodies_of(texts, 1)
            load(port, grouped[:4], 2, 4)
            engine.classify(texts[:128], **TASK)
            for _ in range(arguments.rounds):
                begin = time.perf_counter()
                engine.classify(texts, **TASK)
                engine_rates.append(len(texts) / (time.perf_counter() - begin))
                seconds, _ = load(port, grouped, 8, len(grouped))
                http_rates.append(len(texts) / seconds)
                seconds, _ = load(port, single, 32, len(single))
                single_rates.append(len(texts) / seconds)
            _, alone = load(port, single, SINGLE_CLIENTS, 400)
            start_batch(port, texts * 4)
            time.sleep(1.0)
            _, beside = load(port, single, SINGLE_CLIENTS, 400)
    engine_rate, http_rate = statistics.median(engine_rates), statistics.median(http_rates)
    return {
        "engine_rows_per_s": round(engine_rate, 1),
        "http_rows_per_s": round(http_rate, 1),
        "http_share_of_engine": round(http_rate / engine_rate, 4),
        "http_single_rows_per_s": round(statistics.median(single_rates), 1),
        "items_per_call": arguments.items,
        "threads": arguments.threads,
        "p50_ms": quantile_ms(alone, 0.5),
        "p99_ms": quantile_ms(alone, 0.99),
        "p50_ms_beside_batch": quantile_ms(beside, 0.5),
        "p99_ms_beside_batch": quantile_ms(beside, 0.99),
        "clients": SINGLE_CLIENTS,
    }


def frontend_only(arguments: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    with server([sys.executable, __file__, "--serve-instant"]) as (port, pid):
        bodies = bodies_of(texts, 1)
        load(port, bodies, 8, WARM_REQUESTS)
        before = rss_mib(pid)
        seconds, _ = load(port, bodies, 8, arguments.requests)
        return {
            "frontend_only_requests_per_s": round(arguments.requests / seconds, 1),
            "rss_growth_mib": round(rss_mib(pid) - before, 1),
        }


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve-instant"]:
        serve_instant()
    else:
        main()
