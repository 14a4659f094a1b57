"""The trace of a streamed run: every layer and every bank, in an order that can be."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.engine import build_engine
from moe_prefill.errors import OutputError

MODEL = Path(__file__).resolve().parents[2] / "examples/demo_model/checkpoint"


def test_every_layer_waits_for_its_bank_and_bytes_add_up(tmp_path):
    path = tmp_path / "trace.json"
    settings = {"device": "cpu", "threads": 1, "residency": "resident:2,offloaded:4", "max_sweep_tokens": 256}
    engine = build_engine(EngineConfig(model=str(MODEL), trace=str(path), **settings))
    tokens = np.arange(200, dtype=np.int32)
    engine.score([AtomicRequest.candidates(tokens + shift, [1]) for shift in range(3)])
    stats, sweeps = engine.stats, list(engine.transfers)
    engine.close()
    events = [event for event in json.loads(path.read_text()) if event.get("ph") == "X"]
    layers = [event for event in events if event["name"].startswith("layer")]
    banks = [event for event in events if event["name"].startswith("bank")]
    assert stats.sweeps == len(sweeps) == 3
    assert len(layers) == 3 * 6
    assert len(banks) == 3 * 4
    assert sum(sum(bank["args"].values()) for bank in banks) == stats.moved_bytes > 0
    for bank in banks:
        reader = min(
            (layer for layer in layers if layer["name"].split()[1] == bank["name"].split()[1]),
            key=lambda layer: abs(layer["ts"] - bank["ts"]) if layer["ts"] >= bank["ts"] + bank["dur"] else 1e18,
        )
        assert bank["ts"] + bank["dur"] <= reader["ts"]
    assert all(earlier["ts"] <= later["ts"] for earlier, later in itertools.pairwise(layers))
    assert stats.exposed_s >= 0
    assert all(sweep.exposed_first_ms <= sweep.exposed_ms <= sweep.sweep_ms for sweep in sweeps)


def test_a_trace_that_cannot_be_written_is_refused_before_weights_load(tmp_path):
    with pytest.raises(OutputError, match="--trace"):
        build_engine(EngineConfig(model=str(MODEL), device="cpu", trace=str(tmp_path / "nowhere" / "trace.json")))
