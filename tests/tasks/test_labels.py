"""The label trie asks every position once and finds the sums that a walk over each label finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prefill.errors import TaskError
from moe_prefill.tasks.labels import check_labels, plan_labels, softmax
from tests.tasks.fake_model import answer, logits_after, logprob

label = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)


def _prefix_free(labels: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    kept: list[tuple[int, ...]] = []
    for one in labels:
        if not any(one[: len(other)] == other or other[: len(one)] == one for other in kept):
            kept.append(one)
    return tuple(kept)


labels_strategy = st.lists(label, min_size=1, max_size=12).map(_prefix_free)


@settings(max_examples=150, deadline=None)
@given(labels=labels_strategy, context=st.lists(st.integers(0, 9), min_size=1, max_size=4), vocabulary=st.booleans())
def test_scores_equal_the_direct_sums(
    labels: tuple[tuple[int, ...], ...], context: list[int], vocabulary: bool
) -> None:
    plan = plan_labels(labels, vocabulary)
    requests = plan.requests(np.array(context, dtype=np.int32))
    scores = plan.scores(requests, [answer(request) for request in requests])
    if plan.vocabulary:
        expected = [logprob(context, one) for one in labels]
    else:
        expected = [logits_after(context)[one[0]] for one in labels]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)
    assert plan.longest == max(len(request.tokens) for request in requests) - len(context)
    assert plan.lengths.tolist() == [len(one) for one in labels]


@settings(max_examples=150, deadline=None)
@given(labels=labels_strategy)
def test_every_position_is_asked_once(labels: tuple[tuple[int, ...], ...]) -> None:
    requests = plan_labels(labels).requests(np.array([9, 9], dtype=np.int32))
    asked = [
        (*request.tokens[: at + 1].tolist(), token)
        for request in requests
        for at, start, stop in zip(request.positions, request.id_offsets, request.id_offsets[1:], strict=False)
        for token in request.ids[start:stop].tolist()
    ]
    wanted = {(9, 9, *one[: depth + 1]) for one in labels for depth in range(len(one))}
    assert len(asked) == len(set(asked))
    assert set(asked) == wanted
    assert all((np.diff(request.positions) > 0).all() for request in requests)


def test_single_tokens_need_one_request_and_no_vocabulary() -> None:
    plan = plan_labels(((5,), (7,), (6,)))
    (request,) = plan.requests(np.array([1, 2], dtype=np.int32))
    assert not request.vocabulary
    assert request.ids.tolist() == [5, 7, 6]
    assert request.tokens.tolist() == [1, 2]


def test_a_label_of_several_tokens_needs_the_vocabulary() -> None:
    plan = plan_labels(((5,), (7, 8, 9), (7, 3)))
    (request,) = plan.requests(np.array([1], dtype=np.int32))
    assert request.vocabulary
    assert request.tokens.tolist() == [1, 7, 8]
    assert request.ids.tolist() == [5, 7, 8, 3, 9]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (((1,), ()), "'b' has no tokens"),
        (((1, 2), (1, 2)), "'a' and 'b' are the same tokens"),
        (((1,), (1, 2)), "'a' is a token prefix of label 'b'"),
        (((1, 2, 3), (1, 2)), "'b' is a token prefix of label 'a'"),
    ],
)
def test_labels_that_clash(labels: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        check_labels(labels, ("a", "b"), "close them")


def test_softmax_of_far_scores() -> None:
    np.testing.assert_allclose(softmax(np.array([-1e4, -1e4])), [0.5, 0.5])
    assert softmax(np.array([0.0, -5000.0]))[1] == 0.0
