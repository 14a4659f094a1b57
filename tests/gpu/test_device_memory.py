"""Memory of banks on a GPU: outside torch's, freed with the last view; an error with numbers where there is none."""

import gc

import pytest
import torch

from moe_prefill.errors import PlanError
from moe_prefill.experts import device_memory

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
MIB = 1 << 20


def test_a_bank_lives_as_long_as_its_last_view():
    torch.cuda.init()
    before, torchs = device_memory.held_bytes(DEVICE), torch.cuda.memory_reserved(DEVICE)
    bank = device_memory.empty(64 * MIB, DEVICE)
    assert device_memory.held_bytes(DEVICE) == before + 64 * MIB
    view = bank[MIB : 2 * MIB].view(torch.float32)
    view.fill_(3)
    del bank
    gc.collect()
    assert device_memory.held_bytes(DEVICE) == before + 64 * MIB
    assert view.sum().item() == 3 * MIB / 4
    assert torch.cuda.memory_reserved(DEVICE) - torchs < 64 * MIB
    del view
    gc.collect()
    assert device_memory.held_bytes(DEVICE) == before


def test_what_torch_keeps_for_later_is_used_and_too_much_is_refused_with_numbers():
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    most = torch.cuda.mem_get_info(DEVICE)[0] - 2048 * MIB
    kept = torch.empty(most, dtype=torch.uint8, device=DEVICE)
    del kept  # torch's cache has it now
    bank = device_memory.empty(most // 2, DEVICE)
    assert bank.numel() == most // 2
    before = device_memory.held_bytes(DEVICE)
    with pytest.raises(PlanError, match=r"GiB for expert banks cannot be had on cuda:0 \(.*GiB are free"):
        device_memory.empty(total, DEVICE)
    assert device_memory.held_bytes(DEVICE) == before
