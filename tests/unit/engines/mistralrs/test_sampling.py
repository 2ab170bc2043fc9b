"""vLLM's sampling fields in mistral.rs's words."""

from __future__ import annotations

from typing import Any

import pytest

from xloom.engines.mistralrs.sampling import request_options, stops, token_limit
from xloom.protocol import XloomError


def test_silence_means_what_it_means_to_vllm() -> None:
    assert request_options({}) == {"temperature": 1.0, "top_p": 1.0}
    assert token_limit({}, 100) == 16


def test_greedy_takes_no_other_sampling() -> None:
    assert request_options({"temperature": 0.0, "top_p": 0.5, "top_k": 4}) == {"temperature": 0.0}


def test_what_it_knows_is_passed_on() -> None:
    fields = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    fields |= {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    assert request_options(fields | {"logit_bias": {3: 1}}) == fields | {"logit_bias": {3: 1.0}}


def test_what_the_caller_does_with_the_text_is_no_concern() -> None:
    fields = {"stop": ["x"], "skip_special_tokens": False, "detokenize": False, "output_kind": 1, "_eos_token_id": 1}
    assert request_options({"temperature": 0.0} | fields) == {"temperature": 0.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 0},
        {"seed": 7},
        {"logprobs": 0},
        {"prompt_logprobs": 1},
        {"min_tokens": 3},
        {"allowed_token_ids": [1]},
        {"bad_words": ["x"]},
        {"structured_outputs": {"json": "{}"}},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_what_it_cannot_do_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(XloomError) as caught:
        request_options(fields)
    assert caught.value.code == "unsupported_sampling"
    assert next(iter(fields)) in caught.value.message


def test_a_field_that_asks_for_nothing_is_taken() -> None:
    assert request_options({"seed": None, "presence_penalty": 0.0, "n": 1, "min_tokens": 0, "logprobs": None})


def test_tokens_are_limited_by_the_context() -> None:
    assert token_limit({"max_tokens": 50}, 20) == 20
    assert token_limit({"max_tokens": None}, 20) == 20
    assert token_limit({"max_tokens": 5}, 20) == 5


def test_the_end_of_text_gives_no_reason_and_a_listed_token_itself() -> None:
    ends = stops({"_eos_token_id": 1, "stop_token_ids": [1, 7]}, frozenset({2}))
    assert [ends.reason(token) for token in (1, 7, 2)] == [(True, None), (True, 7), (False, None)]


def test_the_models_own_end_of_text_counts_when_none_is_named() -> None:
    assert stops({}, frozenset({2})).reason(2) == (True, None)
    ignoring = stops({"ignore_eos": True, "_eos_token_id": 1, "stop_token_ids": [7]}, frozenset({2}))
    assert [ignoring.reason(token)[0] for token in (1, 2, 7)] == [False, False, True]
