"""What HTTP costs: the demo model behind the server beside the engine alone, the frontend alone, latency, memory.

    python benchmarks/server_load.py --out benchmarks/results/server.json

Rows are classify prompts: the shipped mails, and rows of 1,000 tokens. Rates are at saturation, both sides in turn, the
median of ``--rounds``:

- the engine alone: ``Engine.classify`` of all rows as one list, in this process. Templates, tokenisation, sweeps as
  large as memory allows and the reading of answers are in it; nothing runs beside it. ``engine_same_calls``: the same
  rows in lists of as many as an HTTP call carries.
- HTTP: the same rows in calls of ``items_per_call``, from threads of this process with persistent connections, bodies
  made beforehand, replies read and not parsed. The server is a process of its own, its engine with ``--threads``
  threads, so on a machine of few cores server and clients share what the engine leaves. Its calls may take
  ``--max-sweep-s``, so that they fill the engine's sweeps; the default of ``serve`` gives up a little for latency.

``*_cpu_ms_per_row`` is processor time of the side's process, which says more than rates where the machine is shared.
The frontend alone has an engine that answers at once: its processor time a row, of which ``prepare_cpu_us_per_row`` is
for template, tokenisation and answers, which the engine alone pays too; and the growth of its memory over
``--requests`` requests. Rows are sent again and again, so the server keeps no prefixes (``--kv-gib 0``). About ten
minutes on two quiet cores.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_prefill import Engine
from moe_prefill.core import AtomicRequest, AtomicResult, EngineLimits, PreparedRow, RunStats
from moe_prefill.tasks import build_task, config_from_mapping
from moe_prefill.text import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/demo_model/checkpoint"
MAILS = ROOT / "examples/data/mails.csv"
TASK = {"labels": ["spam", "ham"], "template": "Mail:\n{text}\n\nQuestion: Is this mail spam or ham?\nAnswer:"}
SINGLE_CLIENTS = 4
WARM_REQUESTS = 5000  # before memory is read for the first time
CPU_ROUNDS = 10  # over all rows


class InstantEngine:
    """Answers at once, so that what remains is the frontend."""

    plan_digest = "instant"
    peak_flops = None

    def __init__(self) -> None:
        self.limits = EngineLimits(max_request_tokens=4096, max_sweep_tokens=65536, vocab_size=8192)
        self.stats = RunStats()

    def score(self, requests: Sequence[AtomicRequest]) -> list[AtomicResult | Exception]:
        return [self.answer(request) for request in requests]

    def answer(self, request: AtomicRequest) -> AtomicResult:
        return AtomicResult(np.zeros(len(request.ids), np.float32), np.ones(len(request.positions), np.float32))

    def close(self) -> None: ...


def serve_instant() -> None:
    """The child process that is the frontend alone."""
    import moe_prefill.workers as workers
    from moe_prefill.config import EngineConfig
    from moe_prefill.server.run import serve
    from moe_prefill.server.settings import ServerConfig

    workers.build_scoring = lambda config: InstantEngine()
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
            while get(port, "/ready")[0] != 200:
                time.sleep(0.05)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    reply = connection.getresponse()
    told = reply.status, reply.read()
    connection.close()
    return told


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> bytes:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    told = reply.read()
    assert reply.status == 200, told
    return told


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


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def batch_runs(port: int) -> bool:
    (batch,) = json.loads(get(port, "/v1/batches")[1])["data"]
    return bool(batch["status"] == "in_progress")


@dataclass(frozen=True)
class Cell:
    """Rows that are sent ``items`` a call by ``clients`` at once; rates are at saturation."""

    name: str
    texts: Sequence[str]
    items: int
    clients: int

    def measure(self, port: int, pid: int, engine: Engine, rounds: int) -> dict[str, Any]:
        """The engine alone and behind HTTP in turn; medians, and the median of the rounds' ratios."""
        bodies = bodies_of(self.texts, self.items)
        count = len(self.texts)
        load(port, bodies[: self.clients], self.clients, self.clients)
        alone, behind, same, engine_cpu, server_cpu = [], [], [], [], []
        for _ in range(rounds):
            before = time.process_time()
            alone.append(count / _seconds(engine, [self.texts]))
            engine_cpu.append(1000 * (time.process_time() - before) / count)
            before = cpu_s(pid)
            seconds, _ = load(port, bodies, self.clients, len(bodies))
            behind.append(count / seconds)
            server_cpu.append(1000 * (cpu_s(pid) - before) / count)
            if self.items > 1:
                parts = [self.texts[at : at + self.items] for at in range(0, count, self.items)]
                same.append(count / _seconds(engine, parts))
        ratios = [http / only for http, only in zip(behind, alone, strict=True)]
        return {
            "rows": self.name,
            "tokens_per_row": round(statistics.mean(len(engine.tokenizer.encode(text)) for text in self.texts[:64])),
            "items_per_call": self.items,
            "clients": self.clients,
            "engine_rows_per_s": round(statistics.median(alone), 1),
            **({"engine_same_calls_rows_per_s": round(statistics.median(same), 1)} if same else {}),
            "http_rows_per_s": round(statistics.median(behind), 1),
            "http_over_engine": round(statistics.median(ratios), 4),
            "engine_cpu_ms_per_row": round(statistics.median(engine_cpu), 2),
            "server_cpu_ms_per_row": round(statistics.median(server_cpu), 2),
        }


def _seconds(engine: Engine, parts: Sequence[Sequence[str]]) -> float:
    begin = time.perf_counter()
    for part in parts:
        engine.classify(part, **TASK)
    return time.perf_counter() - begin


def cells_of(arguments: argparse.Namespace, engine: Engine) -> list[Cell]:
    texts = mails(arguments.rows)
    ids = [engine.tokenizer.encode("\n".join(texts[at : at + 32]))[:1000] for at in range(arguments.long_rows)]
    long = [engine.tokenizer.decode(row) for row in ids]
    assert all(len(row) == 1000 for row in ids), "the mails are too short for rows of 1,000 tokens"
    return [
        Cell("mails", texts, arguments.items, 8),
        Cell("1,000 tokens", long, 1, 32),  # two sweeps of the engine: one is always full
        Cell("mails", texts[: arguments.rows // 2], 1, 32),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--long-rows", type=int, default=128)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--max-sweep-s", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latencies", type=int, default=200)
    parser.add_argument("--requests", type=int, default=200_000)
    arguments = parser.parse_args()
    report = {**against_engine(arguments), **frontend_only(arguments), "requests": arguments.requests}
    report["threads"] = arguments.threads
    report["cpu"] = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    report["command"] = " ".join(["python", *sys.argv])
    report["date"] = datetime.date.today().isoformat()
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def against_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Throughput of the cells; latency of single rows alone and beside a batch."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "moe_prefill.cli", "serve", "--model", str(MODEL), "--port", "0"]
        command += ["--threads", str(arguments.threads), "--data-dir", data, "--kv-gib", "0"]
        command += ["--max-sweep-s", str(arguments.max_sweep_s)]
        with server(command) as (port, pid), Engine(MODEL, threads=arguments.threads) as engine:
            cells = [cell.measure(port, pid, engine, arguments.rounds) for cell in cells_of(arguments, engine)]
            texts = mails(arguments.rows)
            single = bodies_of(texts, 1)
            _, alone = load(port, single, SINGLE_CLIENTS, arguments.latencies)
            start_batch(port, texts * 4)
            time.sleep(1.0)
            _, beside = load(port, single, SINGLE_CLIENTS, arguments.latencies)
            assert batch_runs(port), "the batch ended before the latencies beside it were measured"
    return {
        "engine_rows_per_s": cells[0]["engine_rows_per_s"],
        "http_rows_per_s": cells[0]["http_rows_per_s"],
        "items_per_call": arguments.items,
        "p50_ms": quantile_ms(alone, 0.5),
        "p99_ms": quantile_ms(alone, 0.99),
        "p99_ms_beside_batch": quantile_ms(beside, 0.99),
        "cells": cells,
    }


def frontend_only(arguments: argparse.Namespace) -> dict[str, Any]:
    texts = mails(arguments.rows)
    with server([sys.executable, __file__, "--serve-instant"]) as (port, pid):
        bodies = bodies_of(texts, 1)
        load(port, bodies, 8, WARM_REQUESTS)
        before = rss_mib(pid)
        seconds, _ = load(port, bodies, 8, arguments.requests)
        growth = rss_mib(pid) - before
        calls = bodies_of(texts, arguments.items)
        load(port, calls, 2, len(calls))
        used = cpu_s(pid)
        load(port, calls, 2, CPU_ROUNDS * len(calls))
        return {
            "frontend_only_requests_per_s": round(arguments.requests / seconds, 1),
            "frontend_cpu_us_per_row": round(1e6 * (cpu_s(pid) - used) / CPU_ROUNDS / len(texts), 1),
            "prepare_cpu_us_per_row": round(prepare_cpu_us(texts, arguments.items), 1),
            "rss_growth_mib": round(growth, 1),
        }


def prepare_cpu_us(texts: Sequence[str], items: int) -> float:
    """Processor time of a row in the task alone: template, tokens, and the reading of answers."""
    engine = InstantEngine()
    task = build_task(
        config_from_mapping("classify", TASK, "benchmark"), Tokenizer.from_directory(MODEL), engine.limits
    )
    parts = [[{"text": text} for text in texts[at : at + items]] for at in range(0, len(texts), items)]
    before = 0.0
    for number in range(CPU_ROUNDS + 1):
        if number == 1:  # the first round is warm-up
            before = time.process_time()
        for part in parts:
            for row in task.prepare(part):
                assert isinstance(row, PreparedRow)
                task.finish(row, [engine.answer(request) for request in row.requests])
    return 1e6 * (time.process_time() - before) / CPU_ROUNDS / len(texts)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve-instant"]:
        serve_instant()
    else:
        main()
