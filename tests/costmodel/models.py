"""Small specs, batches and profiles for the tests of the cost model."""

from hypothesis import strategies as st

from moe_prefill.core import LayerSpec, ModelSpec, RopeSpec
from moe_prefill.costmodel import Rows
from moe_prefill.machine import Curve, MachineProfile


def model_spec(layers=((True, None),) * 3, **changes) -> ModelSpec:
    sizes = {
        "family": "qwen3_moe",
        "vocab_size": 97,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "top_k": 2,
        "expert_size": 24,
        "dense_size": 48,
        "norm_eps": 1e-6,
        "rope": RopeSpec(dim=16),
        "max_positions": 1 << 20,
    }
    return ModelSpec(
        **{**sizes, **changes, "layers": tuple(LayerSpec(sparse=sparse, window=window) for sparse, window in layers)}
    )


def machine_profile(host: float = 1e9, **changes) -> MachineProfile:
    """Rates that make compute and copies of a small model comparable."""
    ramp = {"float32": Curve((16, 256, 4096), (1e9, 1e10, 2e10)), "bfloat16": Curve((16, 4096), (1e10, 4e10))}
    facts = {
        "gpu": "cpu",
        "driver": "1",
        "torch": "2",
        "date": "2026-01-01",
        "command": "moe-prefill calibrate",
        "model": "small",
        "gemm": ramp,
        "grouped": ramp,
        "attention": ramp,
        "elementwise": dict.fromkeys(("float32", "bfloat16"), Curve((1, 1000), (1e9, 1e10))),
        "memory_bandwidth": 1e10,
        "layer_overhead_s": 1e-6,
        "transfers": {"host": host, "copy-engine": 4 * host, "nccl": 3 * host, "local": 1e10},
        "bank_bytes": 1000,
        "choices": {"chunk_rows": 4096},
    }
    return MachineProfile(**{**facts, **changes})


windows = st.one_of(st.none(), st.integers(1, 50))
layers = st.lists(st.tuples(st.booleans(), windows), min_size=1, max_size=6).map(tuple)
specs = st.builds(model_spec, layers, shared_size=st.sampled_from([0, 40]), qkv_bias=st.booleans())


@st.composite
def runs(draw, max_runs: int = 6) -> Rows:
    count = draw(st.integers(1, max_runs))
    numbers = lambda low, high: draw(st.lists(st.integers(low, high), min_size=count, max_size=count))  # noqa: E731
    return Rows.of(numbers(0, 100), numbers(1, 100), numbers(1, 3))
