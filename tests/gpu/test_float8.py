"""Float8 on a GPU: each product against its plain reference, repeated beside a copy; engines on float8 checkpoints."""

import numpy as np
import pytest
import torch

from moe_prefill import ops
from moe_prefill.config import EngineConfig
from moe_prefill.core import AtomicRequest
from moe_prefill.engine import build_engine
from moe_prefill.ops.block_experts import block_grouped_mm, ref_block_grouped_mm
from moe_prefill.ops.block_linear import KERNELS, ref_block_mm
from moe_prefill.ops.grouped import ref_scaled_grouped_mm
from moe_prefill.ops.linear import ref_linear
from moe_prefill.ops.quantize import quantize_groups
from tests.checkpoint.float8_models import save
from tests.reference import reference_logits

pytestmark = pytest.mark.gpu
ALIGNED = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 3, "mlp_only_layers": [1]}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def same_every_time(work) -> torch.Tensor:
    """The result, which 20 runs beside a copy all give."""
    first, source = work(), torch.empty(1 << 26, dtype=torch.uint8, device="cuda")
    target, stream = torch.empty_like(source), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            target.copy_(source)
        assert torch.equal(work(), first)
    torch.cuda.synchronize()
    return first


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got.float() - want.float()).norm() / want.float().norm()) < 0.01


@pytest.mark.parametrize(("rows", "n", "c"), [(1, 16, 16), (333, 640, 256), (4096, 5120, 2048)])
def test_linear(rows, n, c):
    x, weight = ops.Float8Rows.of(random(rows, c)), ops.Float8Rows.of(random(n, c, seed=1))
    bias = random(n, seed=2)
    want = ref_linear(x, weight, bias, torch.bfloat16)
    assert_near(same_every_time(lambda: ops.linear(x, weight, bias)), want)
    assert_near(ops.linear(x, weight[: n // 2]), (want - bias)[:, : n // 2])
    for start in range(1, min(rows, 5)):  # whose scales begin anywhere
        assert_near(ops.linear(x[start:], weight, bias), want[start:])


@pytest.mark.parametrize("shape", [(64, 96, 64), (768, 1536, 2048), (33, 40, 72)])  # the last: no shape of torch's
@pytest.mark.parametrize("plain_rows", [False, True])
def test_grouped(shape, plain_rows):
    count, n, c = shape
    ends = torch.tensor([5, 5, count // 2, count], dtype=torch.int32, device="cuda")
    values, scale = ops.quantize_rows(random(4 * n, c, seed=1))
    values, scale = values.view(4, n, c), scale.view(4, n)
    x = random(count, c)
    rows = (x, None) if plain_rows else ops.quantize_rows(x)
    want = ref_scaled_grouped_mm(*rows, values, scale, ends, torch.bfloat16)
    got = same_every_time(lambda: ops.scaled_grouped_mm(*rows, values, scale, ends, torch.bfloat16))
    assert_near(got, want)


def test_block_scaled_grouped():
    refusal = ops.blocks_refused(256, 128, torch.bfloat16, torch.device("cuda"))
    if refusal is not None:
        pytest.skip(refusal)
    values, scale = quantize_groups(random(512, 256))
    weight, grid = ops.quantize_blocks(random(6, 128, 256, seed=1))
    matrix = torch.tensor([0, 4, 5, -1], dtype=torch.int32, device="cuda").repeat_interleave(128)
    arguments = (values, scale, weight.contiguous(), grid.contiguous(), matrix, torch.bfloat16)
    got = same_every_time(lambda: block_grouped_mm(*arguments)[:384])
    assert_near(got, ref_block_grouped_mm(*arguments)[:384])


@pytest.mark.parametrize("rows", [1, 130, 4096])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_block_scaled_linear(kernel, rows):
    """130 rows fill no tile; the output may be part of a wider buffer's rows."""
    if refusal := kernel.refusal(torch.device("cuda")):
        pytest.skip(refusal)
    weight = ops.Float8Blocks.of(random(640, 512, seed=1) * torch.logspace(-1, 1, 512, device="cuda").bfloat16())
    values, scale = quantize_groups(random(rows, 512))

    def work() -> torch.Tensor:
        out = torch.empty(rows, 640, dtype=torch.bfloat16, device="cuda")
        kernel.run(values, scale, weight, out)
        return out

    assert_near(same_every_time(work), ref_block_mm(values, scale, weight, torch.bfloat16))
    part = ops.linear(random(rows, 512), weight[128:384])
    assert_near(part, ref_block_mm(values, scale, weight[128:384], torch.bfloat16))


def requests() -> list[AtomicRequest]:
    random_ids = np.random.default_rng(0)
    rows = [random_ids.integers(0, 50, n, dtype=np.int32) for n in random_ids.integers(1, 300, 12)]
    return [AtomicRequest.candidates(row, np.arange(50), vocabulary=True) for row in rows]


def logits(directory, **settings) -> np.ndarray:
    engine = build_engine(EngineConfig(model=str(directory), device="cuda", dtype="bfloat16", **settings))
    try:
        return np.stack([result.logits for result in engine.score(requests())])
    finally:
        engine.close()


@pytest.mark.parametrize("sizes", [ALIGNED, ALIGNED | {"moe_intermediate_size": 208}], ids=["blocks", "rows"])
def test_a_float8_checkpoint(sizes, tmp_path):
    """``blocks``: with DeepGEMM where it is installed."""
    model, _ = save(tmp_path, **sizes)
    want = np.stack([reference_logits(model, request.tokens)[-1] for request in requests()])
    resident = logits(tmp_path)
    assert 0 < np.linalg.norm(resident - want) / np.linalg.norm(want) < 0.12
    assert np.array_equal(logits(tmp_path, residency="offloaded"), resident)
    assert np.array_equal(logits(tmp_path, check_finite=True), resident)
