"""What would end the engine in its worker is refused when it comes."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from xloom.protocol import XloomError
from xloom.vllm.engine.request_limits import RequestLimits

VOCABULARY = 4096
V2 = RequestLimits(1024, 1024, 128, 128, 1024)


def params(bad_words: list[list[int]] | None = None, **fields: Any) -> SamplingParams:
    made = SamplingParams(**fields)
    made._bad_words_token_ids = bad_words
    return made


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"allowed_token_ids": list(range(1025))},
        {"min_tokens": 1, "stop_token_ids": list(range(129))},
        {"bad_words": [[1]] * 129},
        {"bad_words": [[1] * 1000, [2] * 25]},
    ],
)
def test_more_than_the_workers_arrays_hold_is_refused_where_they_are(fields: dict[str, Any]) -> None:
    with pytest.raises(XloomError) as caught:
        V2.check(params(**fields), VOCABULARY)
    assert caught.value.code == "invalid_sampling"
    RequestLimits().check(params(**fields), VOCABULARY)  # the V1 runner takes it


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 2**63},
        {"max_tokens": None, "min_tokens": 2**40},
        {"stop_token_ids": [VOCABULARY], "min_tokens": 1},
        {"stop_token_ids": [2**40], "min_tokens": 1},
        {"logit_bias": {VOCABULARY: 1.0}},
        {"allowed_token_ids": [-1]},
        {"bad_words": [[2**33]]},
    ],
)
def test_numbers_out_of_range_are_refused_everywhere(fields: dict[str, Any]) -> None:
    for limits in (V2, RequestLimits()):
        with pytest.raises(XloomError) as caught:
            limits.check(params(**fields), VOCABULARY)
        assert caught.value.code == "invalid_sampling"


def test_what_fits_is_taken() -> None:
    V2.check(params(), VOCABULARY)
    fits = {"logit_bias": dict.fromkeys(range(1024), 1.0), "seed": 2**63 - 1, "stop_token_ids": list(range(300))}
    V2.check(params(**fits, bad_words=[[1]] * 128), VOCABULARY)
