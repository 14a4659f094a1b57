"""Float8 checkpoints with block scales through the engine: close to the model they stand for, the same wherever the
banks live, whichever form their experts are kept in.
"""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from moe_prefill import ops
from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.engine import LocalEngine, build_engine
from moe_prefill.engine.banks import BankMemory
from moe_prefill.engine.block_scales import BlockScales
from moe_prefill.engine.build import float8_form
from moe_prefill.engine.load import load_weights, open_model
from moe_prefill.experts import Ranks
from moe_prefill.memory import plan_memory
from tests.checkpoint.float8_models import save
from tests.engine.block_rank_work import alone, bank_digests
from tests.experts.groups import run_group
from tests.reference import reference_logits

ALIGNED = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 3, "mlp_only_layers": [1]}


def requests() -> list[AtomicRequest]:
    random = np.random.default_rng(0)
    rows = [random.integers(0, 50, n, dtype=np.int32) for n in random.integers(1, 70, 12)]
    return [AtomicRequest.candidates(row, np.arange(50), vocabulary=True) for row in rows]


def logits(engine: LocalEngine) -> np.ndarray:
    asked = requests()
    try:
        return np.stack([result.logits for result in engine.score(asked)])
    finally:
        engine.close()


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A model without a size that is a multiple of 128, its float32 counterpart's logits, and the resident engine's."""
    directory = tmp_path_factory.mktemp("odd")
    model, _ = save(directory)
    want = np.stack([reference_logits(model, request.tokens)[-1] for request in requests()])
    return directory, want, logits(engine_on(directory))


def engine_on(directory, **settings) -> LocalEngine:
    return build_engine(EngineConfig(model=str(directory), device="cpu", threads=1, dtype="float32", **settings))


def test_close_to_the_model_that_the_blocks_stand_for(odd):
    _, want, resident = odd
    assert 0 < relative(resident, want) < 0.1, "rows of weights and activations are rounded to float8 again"


def test_banks_stream_with_their_scales(odd):
    directory, _, resident = odd
    assert np.array_equal(logits(engine_on(directory, residency="offloaded")), resident)


def blocks_engine(directory, levels, **load) -> LocalEngine:
    """An engine whose experts keep their blocks, which a CPU computes by the plain reference."""
    spec, _ = open_model(directory)
    device = torch.device("cpu")
    memory = BankMemory(spec, levels, dtype=ops.FLOAT8, device=device, blocks=True)
    _, weights, _ = load_weights(directory, dtype=torch.float32, allocate=memory.allocate, keep=memory.keep, **load)
    plan = plan_memory(spec, kind="cpu", element=4, budget=1 << 30)
    return LocalEngine(spec, weights, memory.source(), plan, device=device)


def test_experts_with_block_scales(tmp_path):
    model, _ = save(tmp_path, **ALIGNED)
    want = np.stack([reference_logits(model, request.tokens)[-1] for request in requests()])
    resident = logits(blocks_engine(tmp_path, ["resident", None, "resident"]))
    assert 0 < relative(resident, want) < 0.05
    for levels in (["offloaded", None, "offloaded"], ["resident", None, "offloaded"]):
        assert np.array_equal(logits(blocks_engine(tmp_path, levels)), resident), levels


WHOLE = ALIGNED | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 256}


def test_a_whole_model_with_the_blocks_it_was_published_with(tmp_path):
    """Nearer to what the blocks stand for than with linear maps that are quantised again with a scale a row."""
    model, _ = save(tmp_path, **WHOLE)
    want = np.stack([reference_logits(model, request.tokens)[-1] for request in requests()])
    levels = ["resident", None, "resident"]
    kept = logits(blocks_engine(tmp_path, levels, float8=True, blocks=True))
    again = logits(blocks_engine(tmp_path, levels, float8=True))
    assert 0 < relative(kept, want) < relative(again, want) < 0.1
    streamed = blocks_engine(tmp_path, ["offloaded", None, "resident"], float8=True, blocks=True)
    assert np.array_equal(logits(streamed), kept)
    built = engine_on(tmp_path)  # on a CPU experts have no kernel with blocks
    assert built.experts_kernel == "fp8-linear-blocks"
    assert relative(kept, want) < relative(logits(built), want) < 0.1


def test_the_form_is_chosen_before_start_and_named(tmp_path, caplog, monkeypatch):
    """As on a Hopper GPU, whose two questions are answered here."""
    save(tmp_path, **WHOLE)
    spec, _ = open_model(tmp_path)
    caplog.set_level("INFO")

    def form(spec, linear=None, experts=None):
        caplog.clear()
        monkeypatch.setattr(ops, "blocks_refused", lambda *asked: experts)
        monkeypatch.setattr(ops, "block_linear_refused", lambda *asked: linear)
        return float8_form(spec, "float8_e4m3fn", torch.bfloat16, torch.device("cpu"))

    assert form(spec) == "fp8-published"
    assert "8 linear maps keep their published block scales, kernel plain" in caplog.text
    assert form(spec, linear="no kernel") == "fp8-blocks"
    assert "8 linear maps published with block scales are quantised again with a scale a row: no kernel" in caplog.text
    assert form(spec, linear="none", experts="none") == "fp8"
    assert form(spec, experts="no kernel") == "fp8-linear-blocks"
    assert "experts published with block scales are quantised again with a scale a row: no kernel" in caplog.text
    assert form(replace(spec, float8_blocks=False)) == "fp8-blocks"
    assert not caplog.text
    assert form(replace(spec, dense_size=144)) == "fp8-published"
    assert "2 linear maps published with block scales are quantised again" in caplog.text
    assert "6 linear maps keep" in caplog.text


def test_dummy_weights_fill_blocks(tmp_path):
    save(tmp_path, **ALIGNED)
    spec, _ = open_model(tmp_path)
    memory = BankMemory(
        spec, ["resident", None, "offloaded"], dtype=ops.FLOAT8, device=torch.device("cpu"), blocks=True
    )
    options = {"dtype": torch.float32, "load_format": "dummy"}
    _, _, wide = load_weights(tmp_path, **options)
    load_weights(tmp_path, **options, allocate=memory.allocate, keep=memory.keep)
    source = memory.source()
    source.begin_sweep()
    for layer in (0, 2):
        bank = source.acquire(layer)
        got = ops.dequantize_blocks(bank.gate_up, bank.gate_up_scale[:, :2].flatten(1, 2))
        error = (got - wide[layer].gate_up).norm() / wide[layer].gate_up.norm()
        assert 0 < error < 0.03
        source.release(layer)
    source.close()


def test_ranks_tell_each_other_their_scales(tmp_path):
    save(tmp_path, **ALIGNED)
    spec, _ = open_model(tmp_path)
    store, found = HashStore(), {}

    def work(rank: int) -> None:
        scales = BlockScales(spec, [0], torch.device("cpu"))
        mine = range(rank * 4 // 3, (rank + 1) * 4 // 3)
        scales.place(0, "gate_up", mine).fill_(rank + 1)
        scales.place(0, "down", mine).fill_(rank + 11)
        scales.share(0, Ranks(rank, 3, store))
        found[rank] = scales.of(0)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gates, downs in found.values():
        assert gates[:, 0].mean((1, 2)).tolist() == gates[:, 1].mean((1, 2)).tolist() == [1, 2, 3, 3]
        assert downs[:, 2].mean((1, 2)).tolist() == [11, 12, 13, 13]


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """Seven experts, which neither 2 nor 3 divides, and a dense layer between the sparse ones."""
    directory = tmp_path_factory.mktemp("seven")
    save(directory, **ALIGNED, num_experts=7)
    return str(directory)


def test_scales_stand_beside_the_banks_that_they_were_published_with(seven):
    digests = alone(seven, ["resident", None, "resident"])
    assert digests[:2] == digests[2:]
    assert digests[0] != digests[1]
    assert alone(seven, ["offloaded", None, "resident"]) == digests
    assert alone(seven, ["offloaded", None, "offloaded"]) == digests


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("levels", "transport"),
    [
        (["sharded", None, "sharded"], "copy-engine"),
        (["sharded", None, "sharded"], "nccl"),
        (["hybrid", None, "hybrid"], "copy-engine"),
        (["hybrid", None, "sharded"], "copy-engine"),
        (["resident", None, "hybrid"], "copy-engine"),
    ],
)
def test_every_rank_has_the_same_bytes_and_scales_whatever_moves(tmp_path, seven, size, levels, transport):
    want = alone(seven, ["resident", None, "resident"])
    assert run_group(bank_digests, size, tmp_path, seven, levels, transport) == [want] * size


def test_what_is_not_computed_as_published_is_logged(tmp_path, caplog):
    save(tmp_path, intermediate_size=136)
    engine_on(tmp_path).close()
    assert "1 linear maps stay in torch.float32, first layers.1.down: 160 x 136 are not multiples" in caplog.text
    assert "experts published with block scales are quantised again with a scale a row: hidden size 160" in caplog.text
