"""Every strategy equals the plain engine, and sends exactly the bytes that docs/communication.md derives."""

import itertools
import os
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from moe_prefill.errors import UsageError
from moe_prefill.experts import ResidentBanks
from moe_prefill.models import spec_from_hf
from moe_prefill.residency import shard_of
from moe_prefill.strategies import NAMES, share_of
from moe_prefill.strategies.load import load_share
from tests.engine.test_equality import comparable_requests
from tests.reference import FAMILIES, convert, engine_of, everything, random_config, random_model
from tests.strategies import formulas, launch
from tests.strategies.worker import Case

SIZES = (2, 4, 3)
DRAWS = 6 if os.environ.get("MOE_PREFILL_LONG") else 1
OPTIONS = (
    {"sharing": "off", "chunk_rows": 33},
    {"sharing": "force", "chunk_rows": 17, "sweep_tokens": 100},
    {"sharing": "force", "sweep_tokens": 150, "micro_batches": 3},
    {"sharing": "off", "sweep_tokens": 80, "prune_last": False},
)


def possible_seeds(family: str, strategy: str, size: int):
    """Configurations of the family that the strategy can split so; the experts of some families never by three."""
    for seed in range(100):
        try:
            share_of(spec_from_hf(random_config(family, seed).to_dict()), strategy, 0, size)
        except UsageError:
            continue
        yield seed


def divided(requests: list, strategy: str, size: int) -> list[list]:
    """Under dp unevenly, with nothing for the last rank; otherwise the same for all."""
    if not strategy.startswith("dp+"):
        return [requests] * size
    return [requests[rank :: size - 1] if rank < size - 1 else [] for rank in range(size)]


def all_cases() -> tuple[list[Case], dict, dict]:
    models, sequences, cases = {}, {}, []
    options = itertools.cycle(OPTIONS)
    for size, strategy in itertools.product(SIZES, NAMES):
        drawn = (
            (family, seed)
            for family in FAMILIES
            for seed in itertools.islice(possible_seeds(family, strategy, size), DRAWS)
        )
        for family, seed in drawn if size != 3 else itertools.islice(drawn, 2 * DRAWS - 1, 2 * DRAWS):
            key = f"{family}-{seed}"
            if key not in models:
                model = random_model(family, seed)
                models[key], sequences[key] = convert(model), comparable_requests(model, seed)
            requests = divided([everything(t) for t in sequences[key]], strategy, size)
            cases.append(Case(key, strategy, size, requests, **next(options)))
    for strategy in NAMES:
        key = next(case.model for case in cases if (case.strategy, case.size) == (strategy, 2))
        requests = divided([everything(t) for t in sequences[key]], strategy, 2)
        cases.append(Case(key, strategy, 2, requests, quantization="fp8"))
    return cases, models, sequences


def plain_engine(converted, quantization: str | None):
    if quantization is None:
        return engine_of(converted)
    slots = launch.in_memory(converted)[1]
    weights, banks = load_share(
        share_of(converted.spec, "dp+ep", 0, 1), lambda slot, shape, rows: slots[slot], "float8_e4m3fn"
    )
    return engine_of(converted, banks=ResidentBanks(banks), weights=weights)


def assert_same(case: Case, got, want) -> None:
    """Float8 rows that are cut have scales of their own, so numbers and now and then an expert differ."""
    if case.quantization and "tp" in case.strategy:
        assert np.linalg.norm(got.logits - want.logits) <= 0.1 * np.linalg.norm(want.logits), case
        np.testing.assert_allclose(got.log_z, want.log_z, atol=0.1)
    else:
        assert np.abs(got.logits - want.logits).max() <= 1e-4 * np.abs(want.logits).max(), case
        np.testing.assert_allclose(got.log_z, want.log_z, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    cases, models, _ = all_cases()
    outcomes = launch.run(
        tmp_path_factory.mktemp("strategies"), cases, {key: launch.in_memory(m) for key, m in models.items()}
    )
    return list(zip(cases, outcomes, strict=True)), models


def test_every_strategy_equals_the_plain_engine(ran):
    runs, models = ran
    for case, outcomes in runs:
        plain = plain_engine(models[case.model], case.quantization)
        for requests, outcome in zip(case.requests, outcomes, strict=True):
            for want, got in zip(plain.score(requests), outcome.results, strict=True):
                assert_same(case, got, want)


def test_the_cases_cover_what_is_hard(ran):
    runs, models = ran
    specs = [(case, models[case.model].spec) for case, _ in runs]
    assert {(case.strategy, case.size) for case, _ in specs} == set(itertools.product(NAMES, SIZES))
    split = [(case.size, spec) for case, spec in specs if case.strategy.startswith("tp+")]
    assert any(spec.num_kv_heads % size for size, spec in split), "key/value heads held by several ranks"
    assert any(spec.qk_norm == "full" for _, spec in split)
    assert any(spec.qkv_bias and spec.out_bias for _, spec in split)
    assert any(spec.num_sparse_layers < spec.num_layers for _, spec in split), "dense layers"
    assert any(layer.window for _, spec in split for layer in spec.layers)
    by_index = [spec.num_experts % case.size for case, spec in specs if case.strategy.endswith("+ep")]
    assert any(by_index), "expert counts that the ranks do not divide"
    assert any(len({len(outcome.sweeps) for outcome in outcomes}) > 2 for _, outcomes in runs), "unequal work"


def predicted(case: Case, spec, outcomes: list, rank: int, layer: int) -> Fraction | int:
    sweeps, mine = [outcome.sweeps for outcome in outcomes], outcomes[rank].sweeps
    float8 = case.quantization is not None
    if case.strategy == "pp+pp":
        stage = [layer for layer in range(spec.num_layers) if layer in shard_of(spec.num_layers, rank, case.size)]
        return formulas.pipeline(spec, layer, case.size, mine, 4) if layer in stage else 0
    if case.strategy == "dp+tp":
        return formulas.token_gather(spec, layer, sweeps, case.chunk_rows, 4, float8)
    if case.strategy == "dp+ep":
        ids = [outcome.ids.get(layer, []) for outcome in outcomes]
        return formulas.expert_dispatch(spec, layer, rank, ids, sweeps, case.chunk_rows, 4, float8)
    return formulas.tensor_parallel(spec, layer, case.size, mine, 4)


def test_bytes_sent_are_those_of_the_formulas(ran):
    runs, models = ran
    for case, outcomes in runs:
        spec = models[case.model].spec
        for rank, outcome in enumerate(outcomes):
            sent = Counter()
            for (layer, _), count in outcome.sent.items():
                sent[layer] += count
            want = {layer: predicted(case, spec, outcomes, rank, layer) for layer in range(spec.num_layers)}
            assert {layer: sent[layer] for layer in want} == want, (case.strategy, case.size, rank)
            assert set(sent) <= set(want)
