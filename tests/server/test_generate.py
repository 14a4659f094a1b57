"""SGLang's /generate beside the engine's own values, as its clients and lm-evaluation-harness read it."""

import numpy as np
import pytest

from .test_openai import rows_of

TEXT = "The film was great and I"
ONE = {"max_new_tokens": 1, "temperature": 0}
NONE = {"max_new_tokens": 0}


def post(http, **body):
    reply = http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(http, **body):
    reply = http.post("/generate", json=body)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def ids_of(engine, text=TEXT):
    return engine.tokenizer.encode(text).tolist()


def test_lists_hold_the_engines_own_values(engine, http):
    ids, probes = ids_of(engine), [5, 300, 7]
    rows = rows_of(engine, ids)
    told = post(
        http, text=TEXT, sampling_params=ONE, return_logprob=True, logprob_start_len=0, top_logprobs_num=3,
        token_ids_logprob=probes, return_text_in_logprobs=True, rid="mine",
    )  # fmt: skip
    meta, best = told["meta_info"], int(rows[-1].argmax())
    assert told["output_ids"] == [best]
    assert told["text"] == engine.tokenizer.token_string(best)
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("mine", len(ids), 1)
    assert meta["finish_reason"] == {"type": "length", "length": 1}
    tokens = meta["input_token_logprobs"]
    assert tokens[0] == [None, ids[0], engine.tokenizer.token_string(ids[0])]
    assert [token for _, token, _ in tokens] == ids
    assert [value for value, _, _ in tokens[1:]] == pytest.approx([rows[i, t] for i, t in enumerate(ids[1:])], abs=1e-4)
    assert meta["input_top_logprobs"][0] is meta["input_token_ids_logprobs"][0] is None
    for name, told_of in (("input", rows[:-1]), ("output", rows[-1:])):
        skip = name == "input"
        for top, row in zip(meta[f"{name}_top_logprobs"][skip:], told_of, strict=True):
            assert [token for _, token, _ in top] == np.argsort(-row, kind="stable")[:3].tolist()
            assert [value for value, _, _ in top] == pytest.approx(np.sort(-row)[:3] * -1, abs=1e-4)
        for listed, row in zip(meta[f"{name}_token_ids_logprobs"][skip:], told_of, strict=True):
            assert [token for _, token, _ in listed] == probes
            assert [value for value, _, _ in listed] == pytest.approx(row[probes], abs=1e-4)
    ((value, token, text),) = meta["output_token_logprobs"]
    assert (value, token, text) == (meta["output_top_logprobs"][0][0][0], best, told["text"])


@pytest.mark.parametrize("start", [0, 2, -2, -1])
def test_a_later_start_tells_the_same_values_of_fewer_tokens(engine, http, start):
    """Negative ones count from the end here."""
    ids = ids_of(engine)
    at = start if start >= 0 else len(ids) + 1 + start
    facts = {"input_ids": ids, "sampling_params": ONE, "return_logprob": True, "token_ids_logprob": [3]}
    whole = post(http, **facts, logprob_start_len=0)["meta_info"]
    part = post(http, **facts, logprob_start_len=at)["meta_info"]
    for name in ("input_token_logprobs", "input_token_ids_logprobs"):
        assert len(part[name]) == len(ids) - at
        assert all(entry is None or entry[0] is None for entry in part[name][:1])
        for (mine, _, _), (want, _, _) in zip(
            part["input_token_logprobs"][1:], whole["input_token_logprobs"][at + 1 :], strict=True
        ):
            assert mine == pytest.approx(want, abs=1e-5)
    assert part["output_token_ids_logprobs"][0][0][0] == pytest.approx(
        whole["output_token_ids_logprobs"][0][0][0], abs=1e-5
    )


def test_by_default_only_the_output_is_told(engine, http):
    meta = post(http, text=TEXT, sampling_params=ONE, return_logprob=True)["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert len(meta["output_token_logprobs"]) == 1
    assert not any("top" in name or "ids" in name for name in meta)
    plain = post(http, text=TEXT, sampling_params=ONE)
    assert set(plain["meta_info"]) == {"id", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert len(plain["output_ids"]) == 1


def test_without_a_new_token_the_place_after_the_prompt_is_told(engine, http):
    """As those do who score labels with SGLang."""
    row = rows_of(engine, ids_of(engine))[-1]
    told = post(
        http, text=TEXT, sampling_params=NONE, return_logprob=True, token_ids_logprob=[9, 8], top_logprobs_num=1
    )
    meta = told["meta_info"]
    assert (told["text"], told["output_ids"], meta["completion_tokens"]) == ("", [], 0)
    assert meta["output_token_logprobs"] == []
    ((value, token, _), *rest) = meta["output_token_ids_logprobs"][0]
    assert (token, rest[0][1]) == (9, 8)
    assert value == pytest.approx(row[9], abs=1e-4)
    assert meta["output_top_logprobs"][0][0][1] == int(row.argmax())
    nothing = post(http, text=TEXT, sampling_params=NONE)
    assert (nothing["output_ids"], nothing["meta_info"]["prompt_tokens"]) == ([], len(ids_of(engine)))


def test_a_list_of_prompts_has_settings_of_each(engine, http):
    told = post(
        http, text=[TEXT, "A", TEXT], sampling_params=[ONE, NONE, ONE], return_logprob=[True, True, False],
        logprob_start_len=[0, 0, 0], top_logprobs_num=[1, 0, 2], token_ids_logprob=[[5], None, [6]],
        rid=["a", "b", "c"],
    )  # fmt: skip
    first, second, third = (one["meta_info"] for one in told)
    assert [one["meta_info"]["id"] for one in told] == ["a", "b", "c"]
    assert [len(one["output_ids"]) for one in told] == [1, 0, 1]
    assert len(first["input_token_ids_logprobs"]) == len(first["input_top_logprobs"]) == len(ids_of(engine))
    assert "output_token_ids_logprobs" not in second
    assert second["input_token_logprobs"][0][0] is None
    assert not any("logprobs" in name for name in third)
    (alone,) = post(http, input_ids=[ids_of(engine)], sampling_params=ONE, token_ids_logprob=[5], return_logprob=True)
    assert len(alone["meta_info"]["output_token_ids_logprobs"][0]) == 1


def test_what_lm_evaluation_harness_reads(engine, http):
    ids, context = ids_of(engine), 3
    told = post(
        http, input_ids=[ids], sampling_params=ONE, logprob_start_len=0, top_logprobs_num=1, return_logprob=True
    )
    meta, rows = told[0]["meta_info"], rows_of(engine, ids)
    read = sum(value for value, *_ in meta["input_token_logprobs"][context:])
    assert read == pytest.approx(sum(rows[at - 1, ids[at]] for at in range(context, len(ids))), abs=1e-3)
    greedy = [own[0] == top[0][0] for own, top in zip(
        meta["input_token_logprobs"][context:], meta["input_top_logprobs"][context:], strict=True
    )]  # fmt: skip
    assert greedy == [int(rows[at - 1].argmax()) == ids[at] for at in range(context, len(ids))]


@pytest.mark.parametrize(
    ("code", "body"),
    [
        ("max_tokens_too_large", {"text": "a", "sampling_params": {"max_new_tokens": 16}}),
        ("max_tokens_too_large", {"text": "a", "sampling_params": {"max_new_tokens": True}}),
        ("max_tokens_missing", {"text": "a"}),
        ("unsupported", {"text": "a", "sampling_params": {"max_new_tokens": 1, "n": 2}}),
        ("unsupported", {"text": "a", "sampling_params": {"max_new_tokens": 1, "regex": "a+"}}),
        ("unsupported", {"text": "a", "sampling_params": ONE, "stream": True}),
        ("unsupported", {"text": "a", "sampling_params": ONE, "image_data": "x"}),
        ("bad_prompt", {"sampling_params": ONE}),
        ("bad_prompt", {"text": "a", "input_ids": [1], "sampling_params": ONE}),
        ("bad_prompt", {"input_ids": "a", "sampling_params": ONE}),
        ("bad_prompt", {"input_ids": ["a"], "sampling_params": ONE}),
        ("bad_text", {"text": [1], "sampling_params": ONE}),
        ("empty", {"text": [], "sampling_params": ONE}),
        ("bad_ids", {"input_ids": [10**9], "sampling_params": ONE}),
        ("bad_list", {"text": ["a", "b"], "sampling_params": [ONE]}),
        ("bad_list", {"text": "a", "sampling_params": ONE, "rid": ["x", "y"]}),
        ("bad_field", {"text": "a", "sampling_params": 1}),
        ("bad_field", {"text": "a", "sampling_params": ONE, "logprob_start_len": "0"}),
        ("bad_start", {"text": "a", "sampling_params": ONE, "return_logprob": True, "logprob_start_len": 99}),
        ("bad_logprobs", {"text": "a", "sampling_params": ONE, "return_logprob": True, "top_logprobs_num": 21}),
        ("bad_choice", {"text": "a", "sampling_params": ONE, "return_logprob": True, "token_ids_logprob": []}),
        ("bad_ids", {"text": "a", "sampling_params": ONE, "return_logprob": True, "token_ids_logprob": [-1]}),
        (
            "too_many_values",
            {
                "input_ids": [[1] * 500] * 2, "sampling_params": ONE, "return_logprob": True, "logprob_start_len": 0,
                "token_ids_logprob": list(range(2000)),
            },
        ),
    ],
)  # fmt: skip
def test_what_is_refused(http, code, body):
    assert refused(http, **body)["code"] == code


def test_a_request_for_more_tokens_is_told_what_this_server_is(http):
    message = refused(http, text="a", sampling_params={"max_new_tokens": 2})["message"]
    assert "max_new_tokens is 2" in message
    assert "scores prompts in one forward pass" in message
