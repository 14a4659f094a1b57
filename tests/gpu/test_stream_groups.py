"""Expert streams among processes: through inter-process memory on one GPU, and between GPUs where there are two."""

import pytest
import torch

from tests.experts import rank_work
from tests.experts.groups import run_group

pytestmark = pytest.mark.gpu
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
COPIES = [number for number, (_, transport) in enumerate(rank_work.MIXES) if transport == "copy-engine"]


@pytest.mark.parametrize("mix", COPIES)
def test_two_processes_on_one_gpu_equal_resident(mix, tmp_path):
    assert run_group(rank_work.gpu_cases, 2, tmp_path, mix, True, start="spawn") == [[], []]


@needs_two
@pytest.mark.parametrize("mix", range(len(rank_work.MIXES)))
def test_two_gpus_equal_resident(mix, tmp_path):
    assert run_group(rank_work.gpu_cases, 2, tmp_path, mix, False, start="spawn") == [[], []]


def test_streams_that_wait_for_a_rank_are_let_go_by_an_abort(tmp_path):
    other, hung = run_group(rank_work.a_gpu_hangs, 2, tmp_path, start="spawn")
    assert (other, hung) == ("the controller found a rank that hangs", "hung")
