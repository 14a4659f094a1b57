"""Scores of continuations, documents and given ids, against sums over a fake model's next-token table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moe_prefill.core import PreparedRow
from moe_prefill.errors import TaskError
from moe_prefill.tasks import ScoreConfig, build_task
from moe_prefill.text import Tokenizer
from tests.tasks.fake_model import LIMITS, WIDE, logits_after, logprob, run
from tests.text.tokenizers_for_tests import real, write_small

ROW = {"question": "Is it a good day?", "answer": "yes, not spam", "text": "the lazy dog"}
CONTINUATION = ScoreConfig(template="{question}\nAnswer:", continuation=" {answer}")


def test_a_continuation_after_its_context(small: Tokenizer) -> None:
    (values,) = run(build_task(CONTINUATION, small, LIMITS), ROW)
    assert isinstance(values, dict)
    context = small.encode("Is it a good day?\nAnswer:").tolist()
    whole = small.encode("Is it a good day?\nAnswer: yes, not spam").tolist()
    scored = whole[len(context) :]
    assert values["logprob"] == pytest.approx(logprob(context, scored), rel=1e-5)
    assert values["num_tokens"] == len(scored) == len(values["token_logprobs"]) == len(values["tokens"])
    assert "".join(values["tokens"]) == " yes, not spam"
    assert sum(values["token_logprobs"]) == pytest.approx(values["logprob"], rel=1e-5)


def test_a_document_after_the_begin_token(small: Tokenizer) -> None:
    (values,) = run(build_task(ScoreConfig(), small, LIMITS), ROW)
    assert isinstance(values, dict)
    ids = small.encode("the lazy dog").tolist()
    assert values["num_tokens"] == len(ids) - 1 == len(values["token_logprobs"])
    assert values["logprob"] == pytest.approx(logprob(ids[:1], ids[1:]), rel=1e-5)


def test_without_a_begin_token_the_first_token_is_unscored(tmp_path: object) -> None:
    tokenizer = Tokenizer.from_directory(write_small(tmp_path, add_bos_token=False))  # type: ignore[arg-type]
    (values,) = run(build_task(ScoreConfig(), tokenizer, LIMITS), ROW)
    assert isinstance(values, dict)
    ids = tokenizer.encode("the lazy dog").tolist()
    assert values["token_logprobs"][0] is None
    assert len(values["tokens"]) == len(ids) == values["num_tokens"] + 1
    assert values["logprob"] == pytest.approx(logprob(ids[:1], ids[1:]), rel=1e-5)
    assert run(build_task(ScoreConfig(), tokenizer, LIMITS), {"text": "a"}) == ["nothing_to_score"]


def test_top_k_and_greedy(small: Tokenizer) -> None:
    task = build_task(dataclasses.replace(CONTINUATION, top_k=3), small, LIMITS)
    (values,) = run(task, ROW)
    assert isinstance(values, dict)
    assert values["is_greedy"] is False
    context = small.encode("Is it a good day?\nAnswer:").tolist()
    row = logits_after(context).astype(np.float64)
    best = np.argsort(-row)[:3]
    first = values["top_logprobs"][0]
    assert [token for token, _ in first] == best.tolist()
    np.testing.assert_allclose([value for _, value in first], row[best] - np.logaddexp.reduce(row), atol=1e-4)
    assert len(values["top_logprobs"]) == values["num_tokens"]


def test_greedy_continuations_are_found(small: Tokenizer) -> None:
    prompt = small.encode("Is it").tolist()
    ids = list(prompt)
    for _ in range(3):
        ids.append(int(logits_after(ids).argmax()))
    task = build_task(ScoreConfig(token_ids_column="ids", positions_column="at", top_k=1), small, LIMITS)
    at = list(range(len(prompt) - 1, len(ids) - 1))
    (greedy, other) = run(task, {"ids": ids, "at": at}, {"ids": [*ids[:-1], ids[-1] ^ 1], "at": at})
    assert isinstance(greedy, dict)
    assert isinstance(other, dict)
    assert greedy["is_greedy"] is True
    assert other["is_greedy"] is False


def test_chat_puts_the_continuation_after_the_generation_prompt(small: Tokenizer) -> None:
    task = build_task(ScoreConfig(template="{question}", continuation="{answer}", chat=True), small, LIMITS)
    (prepared,) = task.prepare([ROW])
    assert isinstance(prepared, PreparedRow)
    (preview,) = task.preview(prepared)
    assert small.decode(preview.context).endswith("Is it a good day?<|end|>assistant\n")
    assert small.decode(preview.candidates[0][1]) == "yes, not spam"


def test_a_context_is_cut_and_a_continuation_is_not(small: Tokenizer) -> None:
    config = dataclasses.replace(CONTINUATION, truncate="left")
    task = build_task(config, small, LIMITS)
    long_context = {**ROW, "question": "day " * 300 + "end"}
    long_answer = {**ROW, "answer": "day " * 300}
    prepared, error = task.prepare([long_context, long_answer])
    assert isinstance(prepared, PreparedRow)
    assert prepared.notes == ("truncated",)
    (preview,) = task.preview(prepared)
    assert small.decode(preview.context).endswith("end\nAnswer:")
    assert small.decode(preview.candidates[0][1]) == " yes, not spam"
    assert len(prepared.requests[0].tokens) == LIMITS.max_request_tokens
    assert not isinstance(error, PreparedRow)
    assert error.code == "too_long"


def test_real_boundaries() -> None:
    for name in ("qwen3", "llama2"):
        task = build_task(CONTINUATION, real(name), WIDE)
        (prepared,) = task.prepare([{"question": "今日の天気", "answer": "晴れ 👍🏽"}])
        assert isinstance(prepared, PreparedRow)
        (preview,) = task.preview(prepared)
        ids = [*preview.context.tolist(), *preview.candidates[0][1]]
        assert ids == real(name).encode("今日の天気\nAnswer: 晴れ 👍🏽").tolist()


def test_teacher_next_tokens(small: Tokenizer) -> None:
    task = build_task(ScoreConfig(token_ids_column="ids"), small, LIMITS, ["ids"])
    ids = [0, 5, 9, 200]
    as_list, as_text, short, beyond, odd = run(
        task, {"ids": ids}, {"ids": str(ids)}, {"ids": [4]}, {"ids": [1, 430]}, {"ids": [1, "x"]}
    )
    assert isinstance(as_list, dict)
    assert as_list == as_text
    expected = [logprob(ids[:i], ids[i : i + 1]) for i in range(1, 4)]
    np.testing.assert_allclose(as_list["token_logprobs"], expected, rtol=1e-5)
    assert as_list["logprob"] == pytest.approx(sum(expected), rel=1e-5)
    assert [short, beyond, odd] == ["nothing_to_score", "bad_ids", "bad_list"]


def test_teacher_candidates_at_positions(small: Tokenizer) -> None:
    config = ScoreConfig(token_ids_column="ids", positions_column="at", candidate_ids_column="of", top_k=2)
    task = build_task(config, small, LIMITS)
    row = {"ids": [3, 4, 5, 6], "at": [0, 3], "of": [[7, 8, 9], [1]]}
    values, same, *codes = run(
        task,
        row,
        {**row, "of": [7]},
        {**row, "at": [3, 0]},
        {**row, "at": [0, 4]},
        {**row, "of": [[7]]},
        {**row, "of": [[], [1]]},
        {**row, "at": []},
    )
    assert isinstance(values, dict)
    assert isinstance(same, dict)
    first, last = values["candidate_logprobs"]
    np.testing.assert_allclose(first, [logprob([3], [token]) for token in (7, 8, 9)], rtol=1e-5)
    np.testing.assert_allclose(last, [logprob([3, 4, 5, 6], [1])], rtol=1e-5)
    assert [len(part) for part in same["candidate_logprobs"]] == [1, 1]
    assert [len(entry) for entry in values["top_logprobs"]] == [2, 2]
    assert codes == ["bad_positions", "bad_positions", "bad_list", "empty_text", "nothing_to_score"]


def test_ids_of_numpy_are_ids(small: Tokenizer) -> None:
    config = ScoreConfig(token_ids_column="ids", positions_column="at", candidate_ids_column="of")
    task = build_task(config, small, LIMITS)
    ids = np.arange(3, 7)
    plain = {"ids": ids.tolist(), "at": [0, 1], "of": [[7, 8], [9, 1]]}
    rows = [plain, {"ids": list(ids), "at": range(2), "of": [np.array([7, 8]), np.array([9, 1])]}]
    first, second = (prepared.requests[0] for prepared in task.prepare(rows) if isinstance(prepared, PreparedRow))
    assert first.tokens.tolist() == second.tokens.tolist() == [3, 4]
    assert first.ids.tolist() == second.ids.tolist() == [7, 8, 9, 1]


def test_a_teacher_prompt_ends_at_the_last_asked_position(small: Tokenizer) -> None:
    task = build_task(ScoreConfig(token_ids_column="ids", positions_column="at"), small, LIMITS)
    prepared, error = task.prepare([{"ids": list(range(300)), "at": [1, 7]}, {"ids": list(range(300)), "at": [250]}])
    assert isinstance(prepared, PreparedRow)
    assert prepared.requests[0].tokens.tolist() == list(range(8))
    assert not isinstance(error, PreparedRow)
    assert error.code == "too_long"


def test_options_that_contradict() -> None:
    with pytest.raises(TaskError, match="need token_ids_column"):
        ScoreConfig(positions_column="at")
    with pytest.raises(TaskError, match="excludes template"):
        ScoreConfig(token_ids_column="ids", template="{text}")
    with pytest.raises(TaskError, match="needs a template"):
        ScoreConfig(chat=True)
    with pytest.raises(TaskError, match="top_k is -1"):
        ScoreConfig(top_k=-1)
