"""The kernels for bfloat16 experts, each against the plain reference and without a word to the host."""

import pytest
import torch

from moe_prefill.ops.expert_rows import KERNELS
from moe_prefill.ops.permute import order_by_expert, permute

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = torch.device("cuda", 0)


def case(tokens: int, experts: int, top_k: int, dim: int, inner: int, used: int):
    """Rows of which some experts get none, and a strided bank: an expert's gate, up and down lie side by side."""
    generator = torch.Generator(DEVICE).manual_seed(tokens + experts)
    x = torch.randn(tokens, dim, device=DEVICE, generator=generator).bfloat16()
    bank = (torch.randn(experts, 3 * inner * dim, device=DEVICE, generator=generator) * dim**-0.5).bfloat16()
    gate_up = bank[:, : 2 * inner * dim].view(experts, 2 * inner, dim)
    down = bank[:, 2 * inner * dim :].view(experts, dim, inner)
    ids = torch.rand(tokens, used, device=DEVICE, generator=generator).topk(top_k).indices + (experts - used)
    return x, order_by_expert(ids, experts), gate_up, down


def reference(x, order, gate_up, down):
    """Float32, an expert at a time."""
    rows, out = permute(x, order).float(), []
    ends = [0, *order.ends_E.tolist()]
    for expert in range(len(gate_up)):
        both = rows[ends[expert] : ends[expert + 1]] @ gate_up[expert].float().t()
        gate, up = both.chunk(2, dim=-1)
        out.append((torch.nn.functional.silu(gate) * up) @ down[expert].float().t())
    return torch.cat(out)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 4, 1, 64, 32, 2),
        (3, 8, 2, 128, 64, 5),
        (257, 16, 4, 256, 96, 16),
        (1000, 60, 4, 2048, 1408, 30),
        (4096, 128, 8, 2048, 768, 128),
        (2048, 128, 8, 4096, 1536, 9),
    ],
    ids=str,
)
def test_experts_of_rows(kernel, sizes):
    refusal = kernel.refusal(DEVICE)
    if refusal is not None:
        pytest.skip(refusal)
    x, order, gate_up, down = case(*sizes)
    kernel.run(x, order, gate_up, down)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, again = (kernel.run(x, order, gate_up, down) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = reference(x, order, gate_up, down)
    assert torch.equal(got, again)
    error = (got.float() - want).norm() / want.norm()
    assert error < 0.01, error
