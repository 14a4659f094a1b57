"""Several processes: every way of sharing banks gives the bits of resident ones, in rounds of any work; a lost rank is
told in bounded time.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from moe_prefill.core import LayerSpec
from moe_prefill.engine.banks import BankMemory
from moe_prefill.errors import UsageError
from moe_prefill.experts import BankLayout, Ranks
from moe_prefill.residency import expert_record
from tests.checkpoint import float8_models
from tests.experts import rank_work
from tests.experts.groups import LOST, run_group
from tests.experts.helpers import FOUR_LAYERS, filled_memory, model_of
from tests.reference import VOCAB, random_model

SEEDS = 6 if os.environ.get("MOE_PREFILL_LONG") else 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_transport_equals_resident(size, tmp_path):
    assert run_group(rank_work.all_cases, size, tmp_path, SEEDS) == [[]] * size


@pytest.mark.parametrize("size", [1, 3])
def test_engines_built_from_files_equal_resident(size, tmp_path):
    random_model("olmoe", FOUR_LAYERS).save_pretrained(tmp_path / "model")
    assert run_group(rank_work.built_engines, size, tmp_path, str(tmp_path / "model")) == [[]] * size


@pytest.mark.parametrize("size", [1, 3])
def test_float8_banks_with_block_scales_equal_resident(size, tmp_path):
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 4, "mlp_only_layers": []}
    float8_models.save(tmp_path, vocab_size=VOCAB, **sizes)
    assert run_group(rank_work.float8_engines, size, tmp_path, str(tmp_path)) == [[]] * size


def test_ranks_with_0_1_and_3_sweeps_of_work_and_a_late_one(tmp_path):
    assert run_group(rank_work.rounds, 3, tmp_path) == [[]] * 3


@pytest.mark.parametrize("which", ["staged", "gathered"])
def test_chaos_shows_a_missing_wait_for_peers(which, tmp_path):
    assert any(run_group(rank_work.broken_hybrid, 2, tmp_path, which, 3))


# One buffer, one staged shard. A rank that dies before its first layer has staged bank 0 and gathered it: its peers
# then wait for bank 1 to be staged, or for their own slot to be read. Later deaths are waited for a layer later.
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_rank_that_dies_is_told_after_the_timeout(after, tmp_path):
    *others, dead = run_group(
        rank_work.one_rank_dies, 3, tmp_path, ("hybrid",), "copy-engine", after, False, timeout_s=2
    )
    assert dead == LOST
    assert all("in 2 s" in said for said in others), others


def test_waits_are_let_go_by_an_abort(tmp_path):
    *others, dead = run_group(rank_work.one_rank_dies, 3, tmp_path, ("hybrid",), "copy-engine", 1, True)
    assert dead == LOST
    assert others == ["the controller lost a rank"] * 2


def test_a_rank_that_dies_in_a_collective_is_told(tmp_path):
    *others, dead = run_group(rank_work.one_rank_dies, 2, tmp_path, ("sharded",), "nccl", 1, False, timeout_s=5)
    assert dead == LOST
    assert all("failed" in said for said in others), others


def test_pulls_need_no_living_peer(tmp_path):
    """Banks that are pulled by copies couple no ranks: the others end their sweeps before anyone tells them."""
    *others, dead = run_group(rank_work.one_rank_dies, 3, tmp_path, ("sharded",), "copy-engine", 1, False)
    assert dead == LOST
    assert others == ["no error"] * 2


def test_a_rank_that_does_not_come_is_told(tmp_path):
    said, _ = run_group(rank_work.nobody_comes, 2, tmp_path, timeout_s=0.5)
    assert "waited 0.5 s" in said


def test_hybrid_banks_and_collectives_are_refused_before_anything_is_allocated():
    converted = model_of("olmoe", FOUR_LAYERS)
    with pytest.raises(UsageError, match="--transport copy-engine"):
        filled_memory(converted, ["hybrid"] * 4, ranks=Ranks(0, 2, HashStore()), transport="nccl")


@pytest.mark.parametrize(("level", "transport"), [("sharded", "copy-engine"), ("sharded", "nccl"), ("hybrid", "")])
def test_more_ranks_than_experts(level, transport):
    """Threads can be ranks too. Six share four experts: some hold none."""
    converted = model_of("olmoe", 3)
    spec = dataclasses.replace(converted.spec, num_experts=4, top_k=2)
    layout = BankLayout(4, expert_record(spec, "float32"))
    whole = torch.randn(layout.bank_bytes // 4).view(torch.uint8)
    store, got = HashStore(), {}

    def work(rank: int) -> None:
        memory = BankMemory(
            dataclasses.replace(spec, layers=(LayerSpec(sparse=True),)),
            [level],
            dtype=torch.float32,
            device=torch.device("cpu"),
            ranks=Ranks(rank, 6, store, timeout_s=30),
            transport=transport,
        )
        memory._transports[level].place(0).copy_(whole[layout.shard(rank, 6)])
        source = memory.source()
        for turn in range(2):
            source.begin_sweep()
            bank = source.acquire(0)
            got[rank, turn] = bank.gate_up.clone(), bank.down.clone()
            source.release(0)
            source.end_sweep()
        source.close()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    want = layout.views(whole)
    assert len(got) == 12
    assert all(torch.equal(gate_up, want["gate_up"]) for gate_up, _ in got.values())
    assert all(torch.equal(down, want["down"]) for _, down in got.values())
