"""The nouns that cross rooms. Imports numpy and nothing of ours but ``errors``.

Shapes use these letters: T tokens of a request, A asked positions, C asked token ids over all asked positions,
K entries of a top-k list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]

Level = Literal["resident", "sharded", "offloaded", "hybrid"]  # where a bank lives

# How sweeps reach the ranks of a group: each to a rank that is free; one to every rank in each numbered round, empty
# where sweeps are short; or each to all ranks, which compute it together.
Schedule = Literal["free", "rounds", "together"]

NOT_KEPT = "\0not kept"  # salt of requests of which no pool keeps anything: a warm-up's


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of a model.

    ``kind`` is one of the transformers names. ``factor`` stretches positions; the other fields are read only by the
    kinds that know them. ``dim`` is the number of channels of a head that rotate.
    """

    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    theta: float = 10000.0
    dim: int
    factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float | None = None  # yarn; None: derived from factor, mscale and mscale_all_dim
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole channels
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What differs from layer to layer: experts or a dense feed-forward, and the attention window in tokens."""

    sparse: bool
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The mathematics of a decoder as numbers: everything that the engine, the cost model and the planner need to know.

    Sizes are channels unless said otherwise. ``layers`` has one entry a layer.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    num_experts: int
    top_k: int
    expert_size: int  # intermediate size of one routed expert
    dense_size: int = 0  # intermediate size of the dense layers
    shared_size: int = 0  # intermediate size of the shared expert; 0: there is none
    norm_eps: float
    rope: RopeSpec
    max_positions: int  # longest request, tokens
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    clip_qkv: float | None = None
    norm_topk_prob: bool = True
    router_weights_float32: bool = False  # Mixtral; the other families round them to the model's dtype
    tie_embeddings: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # as published
    float8_blocks: bool = False  # published with float8 matrices that have a scale for each block of 128 x 128

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)
        assert 0 < self.top_k <= self.num_experts, (self.top_k, self.num_experts)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_sparse_layers(self) -> int:
        return sum(layer.sparse for layer in self.layers)

    @property
    def bank_parameters(self) -> int:
        """Parameters of one layer's routed experts."""
        return self.num_experts * 3 * self.expert_size * self.hidden_size


@dataclass(frozen=True, slots=True, eq=False)
class AtomicRequest:
    """One token sequence and what is asked of it: the unit that the engine computes (paper section 3.1).

    ``tokens`` int32 [T]. ``positions`` int32 [A], strictly increasing: the indices of ``tokens`` whose next-token
    distribution is asked. ``ids`` int32 [C] with ``id_offsets`` int32 [A + 1]: the candidate ids of asked position a
    are ``ids[id_offsets[a]:id_offsets[a + 1]]`` (possibly none). ``vocabulary`` asks for the log-partition over the
    whole vocabulary at every asked position; ``top_k`` for that many most likely tokens (needs ``vocabulary``).
    ``salt``: requests with different salts never share computed state; those with ``NOT_KEPT`` leave none behind.
    """

    tokens: Int32Array
    positions: Int32Array
    ids: Int32Array
    id_offsets: Int32Array
    vocabulary: bool = False
    top_k: int = 0
    salt: str = ""

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 1, self.tokens.shape
        assert len(self.tokens) > 0, "a request has at least one token"
        assert len(self.positions) > 0, "a request asks for at least one position"
        assert len(self.id_offsets) == len(self.positions) + 1, (len(self.id_offsets), len(self.positions))
        assert self.id_offsets[0] == 0, self.id_offsets
        assert self.id_offsets[-1] == len(self.ids), (self.id_offsets, len(self.ids))
        assert self.positions[0] >= 0, self.positions
        assert self.positions[-1] < len(self.tokens), (self.positions, len(self.tokens))
        assert self.top_k == 0 or self.vocabulary, "top_k needs the log-partition"

    @classmethod
    def candidates(
        cls, tokens: npt.ArrayLike, ids: npt.ArrayLike, *, vocabulary: bool = False, salt: str = ""
    ) -> AtomicRequest:
        """Ask for the logits of ``ids`` after the last token."""
        tokens, ids = _int32(tokens), _int32(ids)
        return cls(tokens, _int32([len(tokens) - 1]), ids, _int32([0, len(ids)]), vocabulary, 0, salt)

    @classmethod
    def continuation(cls, tokens: npt.ArrayLike, start: int, *, top_k: int = 0, salt: str = "") -> AtomicRequest:
        """Ask for the log-probability of every token from index ``start`` on, given all tokens before it.

        The last token is only ever read as a target, so it is not computed. ``1 <= start < len(tokens)``.
        """
        full = _int32(tokens)
        assert 1 <= start < len(full), (start, len(full))
        asked = np.arange(start - 1, len(full) - 1, dtype=np.int32)
        return cls(full[:-1], asked, full[start:].copy(), np.arange(len(asked) + 1, dtype=np.int32), True, top_k, salt)


@dataclass(frozen=True, slots=True, eq=False)
class AtomicResult:
    """The answer to one AtomicRequest.

    ``logits`` float32 [C]: raw logits of ``ids``. ``log_z`` float32 [A]: log-sum-exp over the vocabulary (natural
    logarithm), or None when it was not asked. ``top_ids`` int32 [A, K] and ``top_logprobs`` float32 [A, K], descending,
    normalised over the vocabulary, or None.
    """

    logits: Float32Array
    log_z: Float32Array | None = None
    top_ids: Int32Array | None = None
    top_logprobs: Float32Array | None = None

    def logprobs(self, request: AtomicRequest) -> Float32Array:
        """Log-probabilities over the vocabulary of ``request.ids``, float32 [C]. Needs ``request.vocabulary``."""
        assert self.log_z is not None, "the request did not ask for the vocabulary"
        counts = np.diff(request.id_offsets)
        return self.logits - np.repeat(self.log_z, counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the memory plan allows: the longest request and the largest sweep, in tokens; and how many rows go through
    a layer at a time (None: there is no plan). ``kv_gib``: the pool of prefixes, exactly.
    """

    max_request_tokens: int
    max_sweep_tokens: int
    vocab_size: int
    chunk_rows: int | None = None
    kv_gib: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What the cost model has to know of one rank of a group. ``device``: the name by which a profile knows it;
    ``precision``: of the expert products. ``levels`` [layers] (residency), ``bank_bytes`` and ``bank_buffers`` say
    what is streamed; ``kv_blocks`` are the slots of its KV pool.
    """

    spec: ModelSpec
    device: str
    precision: str
    levels: tuple[Level | None, ...]
    bank_bytes: int
    bank_buffers: int
    kv_blocks: int = 0


@dataclass(slots=True, kw_only=True)
class RunStats:
    """Work done since the engine started, for progress lines and summaries. Times are seconds of wall clock."""

    sweeps: int = 0
    requests: int = 0
    prompt_tokens: int = 0  # before sharing
    computed_tokens: int = 0  # after sharing and hits in the pool
    pooled_tokens: int = 0  # of those saved, the ones whose K and V an earlier sweep left in the pool
    flops: int = 0  # true FLOPs of what was computed
    busy_s: float = 0.0
    exposed_s: float = 0.0  # of it, what the computation waited for expert banks
    moved_bytes: int = 0  # of expert banks, over any link
    restarts: int = 0  # of the worker processes, after the loss of one
    recovery_s: float = 0.0  # from the loss to being ready again

    def __add__(self, other: RunStats) -> RunStats:
        return RunStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(RunStats)})

    def __sub__(self, other: RunStats) -> RunStats:
        return RunStats(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(RunStats)})

    @property
    def saved_tokens(self) -> int:
        return self.prompt_tokens - self.computed_tokens


class ScoringEngine(Protocol):
    """What the torch-free half knows of the engine: requests in, results out, in the same order.

    ``score`` answers every request with a result or with the RowError that belongs to it (for example, too long), and
    never raises for one request's sake. The sweeps that it forms depend only on the list it is given, so the same
    list gives bit-identical results. ``plan_digest`` names everything that may change a result's last bits (kernels,
    chunk sizes, sweep bounds, thread count, dtype): a resumed job refuses another one.
    """

    @property
    def limits(self) -> EngineLimits: ...

    @property
    def stats(self) -> RunStats: ...

    @property
    def plan_digest(self) -> str: ...

    @property
    def peak_flops(self) -> float | None:
        """Datasheet FLOP/s of the GEMM precision, or None where it is not known."""
        ...

    def score(self, requests: Sequence[AtomicRequest]) -> list[AtomicResult | Exception]: ...

    def close(self) -> None: ...


@runtime_checkable
class StartingEngine(Protocol):
    """An engine that can begin with a list while another one is computed. ``start`` hands a list in; calling what it
    returns waits for the answers, as ``score`` would give them.
    """

    def start(self, requests: Sequence[AtomicRequest]) -> Callable[[], list[AtomicResult | Exception]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One worker at this moment, for status and metrics. FLOPs: ``load_flops`` is L_i, ``saturation_flops`` T (None:
    not known). ``residency``: how many layers there are of each level. ``stats``: its own work so far.
    """

    rank: int
    alive: bool
    load_flops: int
    saturation_flops: int | None
    residency: Mapping[str, int]
    stats: RunStats


@runtime_checkable
class ReportingEngine(Protocol):
    """An engine that knows its workers one by one. ``worker_states`` may be called by any thread."""

    def worker_states(self) -> Sequence[WorkerState]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column that a task adds to the table; ``kind`` is the type of its values, all of them nullable."""

    name: str
    kind: Literal["string", "float", "int", "bool", "float_map", "strings", "floats", "ints", "float_lists", "json"]


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A row turned into atomic requests; ``state`` is the task's own memory for reading the results."""

    requests: tuple[AtomicRequest, ...]
    state: object = None
    notes: tuple[str, ...] = field(default=())  # counted and reported, for example "truncated"


def _int32(values: npt.ArrayLike) -> Int32Array:
    return np.ascontiguousarray(values, dtype=np.int32)
