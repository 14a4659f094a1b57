"""Runs cases in processes of their own, once for all of them: importing torch takes longer than the cases do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from moe_prefill.core import ModelSpec
from tests.reference import Converted
from tests.strategies.worker import Case, Outcome

ROOT = Path(__file__).resolve().parents[2]
START = "import sys; from tests.strategies import worker; worker.main(sys.argv[1], int(sys.argv[2]))"
Model = tuple[ModelSpec, dict[str, torch.Tensor]]


def in_memory(converted: Converted) -> Model:
    """Spec and every slot, banks included."""
    slots = {name: tensor.detach().clone() for name, tensor in converted.slots.items()}
    for layer, bank in enumerate(converted.banks):
        if bank is not None:
            slots[f"banks.{layer}.gate_up"] = bank.gate_up.detach().clone()
            slots[f"banks.{layer}.down"] = bank.down.detach().clone()
    return converted.spec, slots


def _start(folder: Path, rank: int, log: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-c", START, str(folder), str(rank)]
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def run(folder: Path, cases: list[Case], models: dict[str, Model], device: str = "cpu") -> list[list[Outcome]]:
    """The outcomes of every case, rank by rank; on CUDA with a GPU for every rank."""
    torch.save({"cases": cases, "models": models, "device": device}, folder / "job.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = range(max(case.size for case in cases))
    logs = [folder / f"rank{rank}.log" for rank in ranks]
    workers = [_start(folder, rank, logs[rank], environment) for rank in ranks]
    try:
        while any(worker.poll() is None for worker in workers):
            # One that fails leaves the others waiting for it.
            failed = [log.read_text() for log, worker in zip(logs, workers, strict=True) if worker.returncode]
            assert not failed, "\n".join(failed)
            time.sleep(0.1)
        assert not any(worker.returncode for worker in workers), [log.read_text() for log in logs]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    saved = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in ranks]
    return [[saved[rank][number] for rank in range(case.size)] for number, case in enumerate(cases)]
