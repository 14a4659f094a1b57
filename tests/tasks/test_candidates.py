"""Select and rank: one prompt a candidate, with a shared head, and scores that compare yes with no."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from moe_prefill.core import PreparedRow
from moe_prefill.errors import RowError, TaskError
from moe_prefill.tasks import RankConfig, SelectConfig, build_task
from moe_prefill.text import Tokenizer
from tests.tasks.fake_model import LIMITS, WIDE, logprob, run
from tests.text.tokenizers_for_tests import PROMPTED, real

NAMES = ("spam", "a good day", "the lazy dog", "fox")
TEMPLATE = "{text}? {candidate}:"
ROW = {"text": "quick brown fox", "docs": json.dumps(NAMES)}


def _scores(tokenizer: Tokenizer, names: tuple[str, ...]) -> list[float]:
    scores = []
    for name in names:
        prompt = f"quick brown fox? {name}:"
        context = tokenizer.encode(prompt).tolist()
        yes, no = (logprob(context, tokenizer.encode(prompt + w).tolist()[len(context) :]) for w in (" yes", " no"))
        scores.append(1 / (1 + np.exp(no - yes)))
    return scores


def test_select_keeps_what_reaches_the_threshold(small: Tokenizer) -> None:
    expected = _scores(small, NAMES)
    for threshold in (0.0, 0.5, 1.0):
        config = SelectConfig(candidates=NAMES, template=TEMPLATE, yes="yes", no="no", threshold=threshold)
        (values,) = run(build_task(config, small, LIMITS), ROW)
        assert isinstance(values, dict)
        assert list(values["probabilities"]) == list(NAMES)
        np.testing.assert_allclose(list(values["probabilities"].values()), expected, rtol=1e-4)
        assert values["selected"] == [n for n, p in values["probabilities"].items() if p >= threshold]


@pytest.mark.parametrize("top_n", [None, 1, 3, 99])
def test_rank_orders_by_score(small: Tokenizer, top_n: int | None) -> None:
    config = RankConfig(candidates_column="docs", template=TEMPLATE, yes="yes", no="no", top_n=top_n)
    (values,) = run(build_task(config, small, LIMITS), ROW)
    assert isinstance(values, dict)
    expected = _scores(small, NAMES)
    order = np.argsort([-score for score in expected], kind="stable")[:top_n].tolist()
    assert values["ranking_indices"] == order
    assert values["ranking"] == [NAMES[i] for i in order]
    np.testing.assert_allclose(values["ranking_scores"], [expected[i] for i in order], rtol=1e-4)


def test_equal_candidates_keep_their_order_in_a_ranking_and_are_refused_in_a_set(small: Tokenizer) -> None:
    rank = build_task(RankConfig(candidates_column="docs", template=TEMPLATE), small, LIMITS)
    (values,) = run(rank, {**ROW, "docs": ["fox", "fox", "fox"]})
    assert isinstance(values, dict)
    assert values["ranking_indices"] == [0, 1, 2]
    select = build_task(SelectConfig(candidates_column="docs", template=TEMPLATE), small, LIMITS)
    assert run(select, {**ROW, "docs": ["fox", "fox"]}) == ["duplicate_candidate"]
    with pytest.raises(TaskError, match="'a' is given twice"):
        build_task(SelectConfig(candidates=("a", "a")), small, LIMITS)


def test_rows_without_candidates(small: Tokenizer) -> None:
    task = build_task(RankConfig(candidates_column="docs"), small, LIMITS)
    lists = [[], None, "no list", ["fox", None]]
    assert run(task, *({**ROW, "docs": one} for one in lists)) == [
        "no_candidates",
        "empty_text",
        "bad_list",
        "empty_text",
    ]


def test_the_template_must_name_the_candidate(small: Tokenizer) -> None:
    with pytest.raises(TaskError, match=r"no \{candidate\}"):
        build_task(RankConfig(candidates=NAMES, template="{text}"), small, LIMITS)
    with pytest.raises(TaskError, match="exactly one of candidates"):
        RankConfig()
    with pytest.raises(TaskError, match=r"threshold is 1\.5"):
        SelectConfig(candidates=NAMES, threshold=1.5)
    with pytest.raises(TaskError, match="top_n is 0"):
        RankConfig(candidates=NAMES, top_n=0)


@pytest.mark.parametrize("kind", [SelectConfig, RankConfig])
@pytest.mark.parametrize(("name", "chat"), PROMPTED)
def test_siblings_share_their_prompts_head(kind: type[SelectConfig] | type[RankConfig], name: str, chat: bool) -> None:
    tokenizer = real(name)
    task = build_task(kind(candidates=NAMES, chat=chat), tokenizer, WIDE)
    (prepared,) = task.prepare([{"text": "a long text " * 20}])
    assert isinstance(prepared, PreparedRow)
    assert len(prepared.requests) == len(NAMES)
    assert not any(request.vocabulary for request in prepared.requests)
    contexts = [preview.context.tolist() for preview in task.preview(prepared)]
    shortest = min(map(len, contexts))
    alike = next(i for i in range(shortest) if len({context[i] for context in contexts}) > 1)
    assert alike > shortest - 40
    assert all("Answer Yes or No." in tokenizer.decode(context) for context in contexts)


def test_what_is_kept_of_rows_that_are_too_long_is_small(small: Tokenizer) -> None:
    """An error must not hold the prompts of its row, and no more than a few rows' prompts are held at a time."""
    task = build_task(SelectConfig(candidates=tuple(f"dog {i}" for i in range(200)), template=TEMPLATE), small, LIMITS)
    rows = [{"text": f"{i} " + "the quick brown fox " * 300} for i in range(40)]
    tracemalloc.start()
    try:
        errors = task.prepare(rows)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {error.code for error in errors if isinstance(error, RowError)} == {"too_long"}
    assert kept < 1_000_000, kept
    assert peak < 32_000_000 < len(rows) * 200 * len(rows[0]["text"]), peak


def test_truncation_cuts_shared_texts_alike_and_candidates_apart(small: Tokenizer) -> None:
    config = RankConfig(candidates_column="docs", template="{text}\n\n{candidate}\n\nAnswer:", truncate="right")
    task = build_task(config, small, LIMITS)
    long_text = {"text": "quick brown fox " * 100, "docs": ["one dog", "two lazy dog"]}
    (prepared,) = task.prepare([long_text])
    assert isinstance(prepared, PreparedRow)
    assert prepared.notes == ("truncated",)
    heads = {small.decode(view.context).split("\n\n")[0] for view in task.preview(prepared)}
    assert len(heads) == 1, "all prompts share one shortened text"
    long_docs = {"text": "fox", "docs": [f"{i} " + "lazy dog " * (60 + i) for i in range(20)] + ["short"]}
    (prepared,) = task.prepare([long_docs])
    assert isinstance(prepared, PreparedRow)
    assert max(len(request.tokens) for request in prepared.requests) <= LIMITS.max_request_tokens
    texts = [small.decode(view.context) for view in task.preview(prepared)]
    assert all(text.startswith("<s>fox\n\n") for text in texts)
    assert texts[-1] == "<s>fox\n\nshort\n\nAnswer:"
